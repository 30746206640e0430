from __future__ import annotations

import pytest

from pretrain import evaluate, train


@pytest.mark.parametrize("content", ["[1]", '{"command": "x"}', "{", None])
def test_a_damaged_recipe_json_is_one_sentence_and_2(tmp_path, capsys, content):
    (tmp_path / "vision").mkdir()
    if content is not None:
        (tmp_path / "vision" / "recipe.json").write_text(content)
    assert evaluate.main(["--run-dir", str(tmp_path), "--stage", "vision"]) == 2
    said = capsys.readouterr().err
    assert "holds no recipe.json of a training run" in said and "Traceback" not in said


@pytest.mark.parametrize("command", [evaluate, train])
def test_ctrl_c_is_one_sentence_and_130(tmp_path, capsys, monkeypatch, command):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", stopped)
    argv = ["--run-dir", str(tmp_path), "--stage", "vision"]
    assert command.main([*argv, "--recipe", "tiny", "--ds", "x"] if command is train else argv) == 130
    assert "stopped" in capsys.readouterr().err
