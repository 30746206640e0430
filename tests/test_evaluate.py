from __future__ import annotations

import pytest

from pretrain import evaluate, export, train


@pytest.mark.parametrize("content", ["[1]", '{"command": "x"}', "{", None])
def test_a_damaged_recipe_json_is_one_sentence_and_2(tmp_path, capsys, content):
    (tmp_path / "vision").mkdir()
    if content is not None:
        (tmp_path / "vision" / "recipe.json").write_text(content)
    assert evaluate.main(["--run-dir", str(tmp_path), "--stage", "vision"]) == 2
    said = capsys.readouterr().err
    assert "holds no recipe.json of a training run" in said and "Traceback" not in said


@pytest.mark.parametrize("command", [evaluate, export, train])
def test_ctrl_c_is_one_sentence_and_130(tmp_path, capsys, monkeypatch, command):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", stopped)
    stage = ["--run-dir", str(tmp_path), "--stage", "vision"]
    lines = {evaluate: stage, export: ["to-released", "a", "b"], train: [*stage, "--recipe", "tiny", "--ds", "x"]}
    assert command.main(lines[command]) == 130
    said = capsys.readouterr().err
    assert "stopped" in said and said.count("\n") == 1
