"""The configuration of a Multiway encoder (BEiT-3, arXiv 2208.10442; VLMo, 2111.02358) for transformers."""

from transformers import PretrainedConfig


class MultiwayConfig(PretrainedConfig):
    """The fields have the names and meanings that they have in Imglish, which wrote this directory. `experts`: what the
    weights have parts for; `embed_dim`: width of the dual encoder's vectors, None without; `words`: whether there is a
    head of masked words; `head_bias`, `sigmoid`: whether the dual encoder's projections have a bias, and its logits;
    `evaluation`: how a picture becomes a square, squash or crop."""

    model_type = "imglish_multiway"

    def __init__(
        self,
        dim=768,
        depth=12,
        heads=12,
        ffn_dim=3072,
        image_size=224,
        patch_size=16,
        vocab_size=64010,
        max_text_len=196,
        attention="shared",
        fusion_layers=0,
        sub_norm=False,
        layer_scale=None,
        relative_position=False,
        text_norm=False,
        key_bias=True,
        norm_eps=1e-5,
        final_norm=True,
        head_dim=None,
        ffn="per_modality",
        experts=("vision", "language"),
        embed_dim=None,
        words=False,
        head_bias=False,
        sigmoid=False,
        evaluation="squash",
        **kwargs,
    ):
        self.dim, self.depth, self.heads, self.ffn_dim = dim, depth, heads, ffn_dim
        self.image_size, self.patch_size = image_size, patch_size
        self.vocab_size, self.max_text_len = vocab_size, max_text_len
        self.attention, self.fusion_layers, self.sub_norm = attention, fusion_layers, sub_norm
        self.layer_scale, self.relative_position, self.text_norm = layer_scale, relative_position, text_norm
        self.key_bias, self.norm_eps, self.final_norm = key_bias, norm_eps, final_norm
        self.head_dim = head_dim  # None: the heads fill dim
        self.ffn, self.head_bias, self.sigmoid = ffn, head_bias, sigmoid
        self.experts, self.embed_dim, self.words, self.evaluation = list(experts), embed_dim, words, evaluation
        super().__init__(**kwargs)
