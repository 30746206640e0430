"""Imglish: pretraining of BEiT-3- and VLMo-class vision-language encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrain.interrupt import quiet_imports

if TYPE_CHECKING:
    from pretrain.pretrained import load

__all__ = ["load"]

quiet_imports()


def __getattr__(name: str) -> Any:
    # `import pretrain` stays light: torch comes with the first `pretrain.load`.
    if name == "load":
        from pretrain.pretrained import load

        return load
    raise AttributeError(f"module 'pretrain' has no {name}")
