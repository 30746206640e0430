"""The published sizes, with their sources; where nothing was published, a comment says so. A recipe changes single
fields with `dataclasses.replace`."""

from __future__ import annotations

from dataclasses import replace

from pretrain.models.multiway.config import MultiwayConfig

# BEiT-3 as in the paper (arXiv 2208.10442): table 2 (40 layers, width 1408, inner 6144, 16 heads, patch 14), section
# 2.1 (attention shared, fusion experts in the top three layers), table 11 (224 pixels), section 2.3 (a
# SentencePiece vocabulary of 64k; 64010 ids is the released one's), appendix / footnote 4 (weights within 0.02, layer
# l's output matrices / sqrt(2 l)). Not published: the length of texts; 196 is VLMo's for text alone.
BEIT3_GIANT = MultiwayConfig(
    dim=1408,
    depth=40,
    heads=16,
    ffn_dim=6144,
    image_size=224,
    patch_size=14,
    vocab_size=64010,
    max_text_len=196,
    attention="shared",
    fusion_layers=3,
)
# The paper has no base and no large: its architecture at the released sizes (unilm beit3/modeling_utils.py).
BEIT3_BASE = replace(BEIT3_GIANT, dim=768, depth=12, heads=12, ffn_dim=3072, patch_size=16)
BEIT3_LARGE = replace(BEIT3_GIANT, dim=1024, depth=24, heads=16, ffn_dim=4096, patch_size=16)

# BEiT-3 as released: unilm beit3/modeling_utils.py (_get_base_config, _get_large_config) over torchscale 0.3.0's
# defaults (subln, 1024 positions of which texts use 1022, layernorm_eps 1e-5). Its initialisation for pretraining was
# not published. Here the blocks' matrices have Magneto's (arXiv 2210.06423, 3.3: Xavier normal, gain sqrt(ln 2N);
# torchscale's subln has the gain over Xavier uniform and torch's default), and all other weights BEiT's, as in the
# released fine-tuning code.
BEIT3_BASE_RELEASED = replace(
    BEIT3_BASE, attention="per_modality", fusion_layers=0, sub_norm=True, init="sub_norm", max_text_len=1022
)
BEIT3_LARGE_RELEASED = replace(
    BEIT3_LARGE, attention="per_modality", fusion_layers=0, sub_norm=True, init="sub_norm", max_text_len=1022
)

# VLMo (arXiv 2111.02358) as in unilm vlmo/vlmo: modules/multiway_transformer.py (sizes, vlffn_start_layer_index 10, 21
# and 21, LayerScale 0.1, norm eps 1e-6, no bias on keys), config.py (BERT's vocabulary, bias tables for
# 196 words), vlmo_module.py (no absolute positions where there are relative ones, a norm behind the text embedding).
# Left out: token types (two vectors, which the patch bias and that norm's bias can replace), and that norm's own eps,
# BERT's 1e-12. Initial weights are BEiT-3's here (`init`); VLMo draws all matrices with std 0.02 and no cut, and begins
# with BEiT's weights.
VLMO_BASE = MultiwayConfig(
    dim=768,
    depth=12,
    heads=12,
    ffn_dim=3072,
    image_size=224,
    patch_size=16,
    vocab_size=30522,
    max_text_len=196,
    attention="shared",
    fusion_layers=2,
    layer_scale=0.1,
    relative_position=True,
    text_norm=True,
    key_bias=False,
    norm_eps=1e-6,
)
VLMO_LARGE = replace(VLMO_BASE, dim=1024, depth=24, heads=16, ffn_dim=4096, fusion_layers=3)
VLMO_BASE_PLUS = replace(VLMO_LARGE, dim=544, ffn_dim=2176, relative_position=False, layer_scale=None)
