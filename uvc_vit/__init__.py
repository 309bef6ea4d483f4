"""Unified visual transformer compression (arXiv 2203.08243): timm's plain ViTs to a FLOPs budget, made smaller."""

from uvc_vit.adapter import ViTAdapter
from uvc_vit.compress import compress
from uvc_vit.controller import UVCController
from uvc_vit.export import export
from uvc_vit.plan import Plan
from uvc_vit.slim import slim
from uvc_vit.uvc_config import UVCConfig
from uvc_vit.verify import verify

__all__ = ["Plan", "UVCConfig", "UVCController", "ViTAdapter", "compress", "export", "slim", "verify"]
