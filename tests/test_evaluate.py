from __future__ import annotations

import json

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


def note(tmp_path, **command) -> list[str]:
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "recipe.json").write_text(json.dumps({"command": command}))
    return ["--run-dir", str(tmp_path), "--stage", "vision"]


@pytest.mark.parametrize("name", ["{}/code.py", "code.py", "./code.py", "_beit3", "pretrain.recipes.tiny"])
def test_code_that_a_run_directory_names_is_not_run(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text("open('executed', 'w').close()")
    line = note(tmp_path, recipe=name.format(tmp_path))
    assert evaluate.main(line) == 2
    said = capsys.readouterr().err
    assert not (tmp_path / "executed").exists()
    assert "recipe.json names" in said and "--recipe FILE" in said and said.count("\n") == 1
    # Asked for by name it runs.
    assert evaluate.main([*line, "--recipe", "code.py"]) == 2
    assert (tmp_path / "executed").exists() and "defines no RECIPE" in capsys.readouterr().err


def test_a_built_in_recipe_is_taken_from_the_run_directory(tmp_path, capsys):
    assert evaluate.main(note(tmp_path, recipe="tiny", set=["steps=3"])) == 2
    assert "has neither weights nor a complete checkpoint" in capsys.readouterr().err


def test_settings_that_are_no_list_are_one_sentence(tmp_path, capsys):
    assert evaluate.main(note(tmp_path, recipe="tiny", set=7)) == 2
    assert "command.set=7 is no list" in capsys.readouterr().err


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
