"""Every command that reads weights, given something else: one sentence that names it, and exit code 2."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pretrain import caption, embed, export, search, serve
from pretrain.checkpoint.weights import write_weights
from pretrain.config import to_json
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig
from tests.toys import encoded, picture, refused

COMMANDS = {
    "embed": (embed, "{} {d}/pictures --out {d}/out --workers 1"),
    "caption": (caption, "{} {d}/pictures --out {d}/out --workers 1"),
    "serve": (serve, "{} --port 0"),
    "search": (search, "{d}/vectors --weights {} words"),
    "from-released": (export, "from-released {} {d}/out"),
    "to-released": (export, "to-released {} {d}/out.pth"),
    "to-hf": (export, "to-hf {} {d}/out"),
    "to-onnx": (export, "to-onnx {} {d}/out"),
    "prune": (export, "prune {} {d}/out --heads 1"),
}


class Code:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('it was executed')",)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Pictures, vectors, and files that are no weights."""
    d = tmp_path_factory.mktemp("bad")
    (d / "pictures").mkdir()
    (d / "pictures" / "a.jpg").write_bytes(encoded(picture()))
    (d / "vectors").mkdir()
    (d / "vectors" / "embed.json").write_text('{"weights": "x"}')
    (d / "empty").mkdir()
    (d / "words.pth").write_text("hello")
    (d / "nothing.safetensors").touch()
    (d / "code.pth").write_bytes(pickle.dumps({"model": Code()}))
    torch.save({"model": Code()}, d / "code2.pth")
    torch.save([1, 2], d / "list.pth")
    save_file({"a": torch.zeros(2)}, d / "strange.safetensors")
    tokenizer = VQKDConfig(dim=16, depth=1, heads=2, codes=8, image_size=16, patch_size=8)
    used = {"tokenizer.codebook.last_used": torch.zeros(8, dtype=torch.int64)}
    write_weights(used, d / "tokenizer" / "weights.safetensors", {"model": to_json(tokenizer)})
    return d


WRONG = ("no", "empty", "words.pth", "nothing.safetensors", "code.pth", "code2.pth", "list.pth", "strange.safetensors",
         "tokenizer")  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("wrong", WRONG)
def test_files_that_are_no_weights_are_refused_in_one_sentence(place, capsys, command, wrong):
    module, line = COMMANDS[command]
    said = refused(capsys, module.main, *line.format(place / wrong, d=place).split())
    assert str(place / wrong) in said and ";" in said, said
    for words in ("[Errno", "Weights only", "load_state_dict", "Traceback"):
        assert words not in said
    assert not (place / "out").exists() and not (place / "out.pth").exists()
