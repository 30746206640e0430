"""torch.compile for the blocks of an encoder."""

from __future__ import annotations

from pretrain.models.multiway.encoder import MultiwayEncoder


def compile_blocks(encoder: MultiwayEncoder, backend: str = "inductor") -> None:
    """Compile every block but the model's last, in place and at first use; names and weights stay as they are.

    Blocks of one kind share their code: a model compiles three or four times whatever its depth (drop path's rate is
    zero in the first block, and the top ones may have a third expert). The last block stays as it is: how many rows
    its heads read changes with every mask, and each new size may compile again.
    """
    for name, block in encoder.blocks.named_children():
        if int(name) < encoder.cfg.depth - 1:
            block.compile(backend=backend)
