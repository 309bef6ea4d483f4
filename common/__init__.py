"""The corridor between the papers: config, data, masks, runs, distributed, study and claims. It imports no paper."""
