"""The paper's claims (arXiv 2204.01640; spec b and i); what they measure is in measures.py."""

from app_progressive.measures import (
    cer,
    clean_gap,
    collapse,
    exact,
    final_acc,
    late,
    layers_apart,
    of,
    paired,
    replay_cost,
    smooth,
    transition,
)
from app_progressive.settings import Config
from common.claims import Claim, each

FEW_SHOT = "ResNet-50, few-shot Restricted ImageNet (540 shots)"
PLOTS = "plots only, ResNet/VGG on CIFAR-10/100; no numbers available"


def claims(config: Config) -> list[Claim]:
    """C1 to C8, R1 and R2, at the margin and exponent of the study."""
    tau = config.prune.tau
    share = f"{100 * config.prune.base**tau:.1f} %"
    noise = "mechanism check with 30 % noisy labels, not the paper's setting"
    return [
        Claim(
            id="C1",
            statement=f"APP at {share} of the weights beats dense training: final accuracy, few-shot",
            source="abstract",
            paper=f"about +7 points, {FEW_SHOT}",
            measure=paired("F", "app", "dense", final_acc),
        ),
        Claim(
            id="C1w",
            statement=f"The weaker form: APP at {share} of the weights equals dense training in final accuracy",
            source="abstract",
            paper=f"about +7 points, {FEW_SHOT}",
            measure=paired("F", "app", "dense", final_acc),
            threshold=config.study.margin,
            direction="equivalent",
        ),
        Claim(
            id="C1s",
            statement="APP beats shrink-and-perturb, which prunes nothing: final accuracy, few-shot",
            source="no claim of the paper",
            paper="no such experiment",
            measure=paired("F", "app", "shrink", final_acc),
        ),
        Claim(
            id="C2a",
            statement="APP reduces the generalisation gap: dense minus APP, last epochs, later half of the states",
            source="abstract",
            paper=f"about 22 % (relative or points not said), {FEW_SHOT}",
            measure=paired("F", "dense", "app", late("gap_last")),
        ),
        Claim(
            id="C2b",
            statement="The same for the final clean gap: training minus test accuracy in eval mode",
            source="abstract",
            paper=f"about 22 % (relative or points not said), {FEW_SHOT}",
            measure=paired("F", "dense", "app", clean_gap),
        ),
        *[
            Claim(
                id=f"C2{letter}",
                statement=f"Dense minus APP (tau {exponent:g}), generalisation gap; {noise}",
                source="abstract",
                paper=f"about 22 %, {FEW_SHOT}, clean labels",
                measure=paired("N", "dense", arm, late("gap_last")),
            )
            for letter, exponent, arm in (("n1", tau, "app"), ("n2", 9.5, "app@9.5"))
        ],
        Claim(
            id="C3a",
            statement="APP has a lower cumulative error than dense training: CER of dense minus APP",
            source="Sec. 4",
            paper=PLOTS,
            measure=paired("F", "dense", "app", cer),
            unit="errors",
        ),
        Claim(
            id="C3b",
            statement="APP beats anytime one-shot pruning: final accuracy",
            source="Sec. 4",
            paper=PLOTS,
            measure=paired("F", "app", "osp", final_acc),
        ),
        Claim(
            id="C3c",
            statement="APP beats anytime one-shot pruning: CER of one-shot minus APP",
            source="Sec. 4",
            paper=PLOTS,
            measure=paired("F", "osp", "app", cer),
            unit="errors",
        ),
        Claim(
            id="C4a",
            statement="Along a long stream the gap of APP first rises (to the peak, at places found on other seeds)",
            source="Sec. 4",
            paper="qualitative plot, S = 100",
            measure=transition("app", 0),
        ),
        Claim(
            id="C4b",
            statement="... and then falls",
            source="Sec. 4",
            paper="qualitative plot, S = 100",
            measure=transition("app", 2),
        ),
        Claim(
            id="C4c",
            statement="The peak of APP's gap is lower than that of dense training",
            source="no claim of the paper",
            paper="the transition is shown for APP",
            measure=paired("L", "dense", "app", lambda metrics: float(smooth(metrics["test_gap_last"]).max())),
        ),
        *[
            Claim(
                id=f"C5{letter}",
                statement=f"{title} ends at {share} of the weights, exact to one weight",
                source="Sec. 4",
                paper="about 1/3 of the dense size",
                measure=exact(config, arm),
                threshold=0.5,
                interval="worst",
                unit="of runs",
            )
            for letter, title, arm in (("a", "APP", "app"), ("b", "One-shot pruning", "osp"))
        ],
        Claim(
            id="C6",
            statement="SNIP and magnitude differ in layer densities by more than SNIP does among seeds (L1 distance)",
            source="figure",
            paper="plot, ResNet-50, CIFAR-10, S = 8, tau = 4.5",
            measure=layers_apart,
            unit="density",
        ),
        Claim(
            id="C7a",
            statement="APP suffers without replay: final accuracy with full minus without replay",
            source="authors' follow-up page",
            paper="qualitative",
            measure=paired("T", f"app@{tau:g}", f"app@{tau:g}/none", final_acc),
        ),
        Claim(
            id="C7b",
            statement=f"APP suffers at high sparsity: final accuracy at tau {tau:g} minus at tau 14 (4.4 %)",
            source="authors' follow-up page",
            paper="qualitative",
            measure=paired("T", f"app@{tau:g}", "app@14", final_acc),
        ),
        Claim(
            id="C8a",
            statement="Replay lowers the error: CER without minus with full replay",
            source="ALMA, abstract",
            paper="lower (no number)",
            measure=paired("T", f"app@{tau:g}/none", f"app@{tau:g}", cer),
            unit="errors",
        ),
        Claim(
            id="C8b",
            statement="Replay costs (S + 1) / 2 times the compute (4.5 at S = 8): deviation from it",
            source="ALMA, abstract",
            paper="5 to 10 times",
            measure=replay_cost(config),
            threshold=0.02,
            direction="below",
            interval="worst",
            unit="relative",
        ),
        Claim(
            id="R1",
            statement="The released code trains far sparser than it says: effective over nominal density, state 4 on",
            source="no claim of the paper; the released code",
            paper="36.6 % nominal, 2.4 % effective (ResNet-20s, S = 8; computed from the released functions)",
            measure=each(of("L", "released"), collapse),
            threshold=0.5,
            direction="below",
            interval="worst",
            unit="of nominal",
        ),
        Claim(
            id="R2a",
            statement="That collapse makes the smaller gap: exact minus released APP, later half of the states "
            "(training accuracy as it runs minus test accuracy)",
            source="no claim of the paper",
            paper="no such experiment",
            measure=paired("L", "app", "released", late("test_gap_last")),
        ),
        Claim(
            id="R2b",
            statement="... whatever the scores: released APP equals random masks of its density in that gap",
            source="no claim of the paper",
            paper="no such experiment",
            measure=paired("L", "released", "random", late("test_gap_last")),
            threshold=2.0,
            direction="equivalent",
        ),
        Claim(
            id="R2c",
            statement="R2a for the final clean gap: training minus test accuracy in eval mode, of the last weights",
            source="no claim of the paper",
            paper="no such experiment",
            measure=paired("L", "app", "released", clean_gap),
        ),
    ]
