from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from configs import ConfigError, load_config
from configs.schema import RunConfig

MINIMAL = {"bundle": {"path": "b"}, "base": {"model": "org/tiny"}, "data": {"train": ["t.jsonl"]}}


@pytest.fixture
def write(tmp_path: Path):
    def _write(tree: object) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return path

    return _write


def problems(path: Path, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides or [])
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    return caught.value.problems


def test_minimal_config_has_defaults_and_derived_names(write) -> None:
    config = load_config(write(MINIMAL))
    assert config.base.served_name == "tiny"
    assert config.bundle.work == "b.work"
    assert config.experts.rank == 8


def test_config_is_frozen(write) -> None:
    config = load_config(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        config.experts.rank = 9


def test_all_faults_come_at_once_each_with_path_and_remedy(write) -> None:
    tree = {
        "bundel": {"path": "x"},
        "base": {"model": 5, "nam": "x"},
        "data": {"train": []},
        "experts": {"rank": "eight", "actors": "none", "target_modules": 3},
        "serving": {"engine_args": {"a": {"b": 1}}, "gpu_memory_utilization": 1.5},
    }
    found = problems(write(tree))
    by_key = {line.split(":")[0]: line for line in found}
    assert len(found) == len(by_key) == 10, found
    assert "did you mean 'bundle'" in by_key["bundel"]
    assert "did you mean 'name'" in by_key["base.nam"]
    assert by_key["bundle"].startswith("bundle: missing")
    assert "valid integer" in by_key["experts.rank"]
    assert "LoRA rank" in by_key["experts.rank"]
    assert "'auto'" in by_key["experts.actors"]
    assert "integer" in by_key["experts.actors"]
    assert "less than or equal to 1" in by_key["serving.gpu_memory_utilization"]
    assert "serving.engine_args.a" in by_key


def test_two_budgets_are_refused(write) -> None:
    tree = MINIMAL | {"experts": {"epochs": 1, "tokens_per_expert": 100}}
    assert problems(write(tree)) == ["experts: set 'epochs' or 'tokens_per_expert', not both"]


def test_overrides_win_and_make_missing_sections(write) -> None:
    config = load_config(
        write(MINIMAL),
        ["experts.rank=4", "experts.learning_rate=2e-4", "data.train=[a.jsonl, b.jsonl]", "seed=3"],
    )
    assert config.experts.rank == 4
    assert config.experts.learning_rate == 2e-4
    assert config.data.train == ["a.jsonl", "b.jsonl"]
    assert config.seed == 3


def test_overrides_reach_optional_values_and_names_that_look_like_numbers(write) -> None:
    config = load_config(write(MINIMAL), ["base.revision='123'", "base.name=null"])
    assert config.base.revision == "123"
    assert config.base.name is None


def test_faults_of_overrides_and_of_the_file_come_together(write) -> None:
    path = write(MINIMAL | {"experts": {"rank": 0}})
    found = problems(path, ["nonsense", "experts.actors=none"])
    assert [line.split(":")[0] for line in found] == [
        "--set nonsense",
        "experts.rank",
        "experts.actors",
    ]


def test_keys_that_look_like_types_keep_their_names(write) -> None:
    args = {"structured-outputs-config": {"a": 1}, "stream-interval": {"b": 2}}
    found = problems(write(MINIMAL | {"serving": {"engine_args": args}}))
    assert {line.split(":")[0] for line in found} == {
        f"serving.engine_args.{name}" for name in args
    }


@pytest.mark.parametrize("override", ["experts.rank", "=4", "experts..rank=4", "seed.x=1"])
def test_malformed_overrides_are_named(write, override: str) -> None:
    path = write(MINIMAL | {"seed": 1})
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert f"--set {override}" in caught.value.problems[0]


def test_unknown_override_key_is_a_config_error(write) -> None:
    assert problems(write(MINIMAL), ["experts.rnk=4"]) == [
        "experts.rnk: unknown key; did you mean 'rank'?"
    ]


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "", "\x00"])
def test_unreadable_yaml_is_one_clear_error(write, text: str) -> None:
    assert len(problems(write(text))) == 1


def test_a_missing_file_names_the_presets() -> None:
    with pytest.raises(ConfigError, match="demo, moin_5k, two_gpu"):
        load_config("no/such/file.yaml")


@given(st.dictionaries(st.sampled_from(sorted(RunConfig.model_fields)), st.text() | st.integers()))
def test_nonsense_never_raises_anything_but_config_errors(tmp_path_factory, tree) -> None:
    path = tmp_path_factory.mktemp("nonsense") / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError):
        load_config(path)


def test_every_field_is_documented() -> None:
    undocumented = [
        f"{section}.{key}"
        for section, info in RunConfig.model_fields.items()
        if hasattr(info.annotation, "model_fields")
        for key, field in info.annotation.model_fields.items()
        if not field.description
    ]
    assert undocumented == []
