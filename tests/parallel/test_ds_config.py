"""One owner per knob: what a DeepSpeed JSON may say, and what it is told when it may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.parallel.ds_config import OWNED_ELSEWHERE, load_ds_config, offloads, precision, zero_stage

CONFIGS = Path(__file__).parents[2] / "ds_configs"
BATCH = {"micro": 4, "accumulation": 3, "world": 2, "clip": 1.5}


def refused(tmp_path: Path, content: dict | str) -> str:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as error:
        load_ds_config(path, **BATCH)
    assert "mine.json" in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_each_shipped_config_loads_and_is_what_its_name_says(path):
    config = load_ds_config(path, **BATCH)
    assert zero_stage(config) == int(path.stem[4])
    assert offloads(config) == path.stem.endswith("_offload")
    assert (precision(config) == torch.bfloat16) == path.stem.endswith(("_bf16", "_offload"))
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3
    assert config["train_batch_size"] == 24
    assert config["gradient_clipping"] == 1.5


def test_there_are_configs_for_every_stage():
    assert {f"zero{stage}.json" for stage in range(4)} <= {path.name for path in CONFIGS.glob("*.json")}


def test_clip_0_clips_nothing_and_still_measures():
    assert load_ds_config(CONFIGS / "zero0.json", **BATCH | {"clip": 0.0})["gradient_clipping"] == 1e30


def test_derived_keys_are_added():
    config = load_ds_config(CONFIGS / "zero1.json", **BATCH, pipeline={"pipe_partitioned": False})
    assert config["pipeline"] == {"pipe_partitioned": False}
    assert config["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_what_costs_time_in_each_step_is_off_whatever_deepspeeds_defaults_are(path):
    config = load_ds_config(path, **BATCH)
    assert config["timers"] == {"throughput": {"enabled": False}}
    assert config["wall_clock_breakdown"] is config["memory_breakdown"] is False
    if precision(config) == torch.bfloat16:
        assert config["bf16"] == {"enabled": True, "check_grad_overflow": offloads(config)}


def test_a_json_may_ask_for_timers_but_not_for_silent_skips(tmp_path):
    path = tmp_path / "timers.json"
    path.write_text(json.dumps({"timers": {"throughput": {"enabled": True}}}))
    assert load_ds_config(path, **BATCH)["timers"] == {"throughput": {"enabled": True}}
    assert "max_skipped_steps" in refused(tmp_path, {"bf16": {"enabled": True, "check_grad_overflow": True}})


@pytest.mark.parametrize("key", sorted(OWNED_ELSEWHERE))
def test_a_key_in_two_places_is_refused_by_name(tmp_path, key):
    message = refused(tmp_path, {"zero_optimization": {"stage": 1}, key: 1})
    assert key in message and OWNED_ELSEWHERE[key] in message


def test_the_recipes_knob_is_named(tmp_path):
    assert "optim.clip" in refused(tmp_path, {"gradient_clipping": 1.0})
    assert "batch.accumulation" in refused(tmp_path, {"gradient_accumulation_steps": 4})


def test_unknown_keys_get_the_nearest_name(tmp_path):
    assert "did you mean zero_optimization?" in refused(tmp_path, {"zero_optimisation": {"stage": 1}})
    message = refused(tmp_path, {"zero_optimization": {"stage": 1, "overlap_com": True}})
    assert "zero_optimization.overlap_com" in message and "did you mean overlap_comm?" in message
    message = refused(tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}})
    assert "zero_optimization.offload_optimizer.devise" in message and "did you mean device?" in message
    assert "known:" in refused(tmp_path, {"qqqqqqq": 1})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"fp16": {"enabled": True}}, "bf16"),
        ({"fp16": {}}, "fp16"),
        ({"bf16": {"enabled": True}}, "stage to 1, 2 or 3"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "stage to 1, 2 or 3"),
        ({"bf16": {"enabled": "auto"}}, "true or false"),
        ({"bf16": True}, "must be an object"),
        ({"zero_optimization": {"stage": 4}}, "use 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, "use 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs stage 1"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs stage 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "needs stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "gpu"}}}, "none, cpu or nvme"),
        ({"compile": {"deepcompile": "yes"}}, 'compile.deepcompile="yes" must be true or false'),
        ({"compile": {"deepcompile": True}}, "needs zero_optimization.stage 1, 2 or 3, not 0"),
        (
            {
                "compile": {"deepcompile": True},
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            },
            "compile.deepcompile=true does not go with zero_optimization.offload_optimizer",
        ),
        ({"compile": {"passes": []}}, "compile.passes"),
        ("{", "line 1, column 2"),
        ("[]", "holds a list"),
        ('{"bf16": {"enabled": false}, "bf16": {"enabled": true}}', "twice"),
    ],
)
def test_wrong_content_is_one_clear_sentence(tmp_path, content, says):
    assert says in refused(tmp_path, content)


def test_fp16_switched_off_is_fine(tmp_path):
    path = tmp_path / "off.json"
    path.write_text(json.dumps({"fp16": {"enabled": False}, "zero_optimization": {"stage": 2}}))
    assert "fp16" not in load_ds_config(path, **BATCH)


def test_a_missing_file_names_those_that_are_there():
    with pytest.raises(ValueError, match=r"zero9.json.*zero1\.json"):
        load_ds_config(CONFIGS / "zero9.json", **BATCH)
