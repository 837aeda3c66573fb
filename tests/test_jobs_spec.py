"""A spec: what it accepts, where it says that something is wrong, and what it means on another machine."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.jobs.errors import SpecError
from overtone.jobs.sampling import checkpoint_of
from overtone.jobs.spec import JobSpec, load_spec, spec_reference_markdown, spec_schema

ROOT = Path(__file__).parents[1]
MINIMAL = "model: tiny\nprompts: prompts.parquet\noutput: out\n"


@pytest.fixture
def load(tmp_path):
    def load(text: str | bytes, *overrides: str, name: str = "job.yaml") -> JobSpec:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_spec(path, overrides)

    return load


@pytest.fixture
def refusal(load, tmp_path):
    """The message about a bad spec, without the folder."""

    def refusal(text: str | bytes, *overrides: str) -> str:
        with pytest.raises(SpecError) as caught:
            load(text, *overrides)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return refusal


# What is written and what it means


def test_short_forms_are_the_sections_main_keys(load):
    spec = load("model: tiny\nprompts: [a.parquet, b.parquet]\noutput: out\nshards: 8\nworkers: 2\n")
    assert spec.model.id == "tiny"
    assert [Path(path).name for path in spec.prompts.path] == ["a.parquet", "b.parquet"]
    assert Path(spec.output.path).name == "out"
    assert spec.shards.rows == 8
    assert (spec.workers.count, spec.workers.min, spec.workers.max) == (2, 2, 2)


def test_the_quickstart_is_a_spec():
    spec = load_spec(ROOT / "manifests" / "quickstart.yaml")
    assert spec.name == "quickstart"
    assert spec.prompts.path == (str(ROOT / "manifests" / "quickstart.parquet"),)


def test_paths_are_relative_to_the_spec_and_the_output_to_the_current_folder(load, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    spec = load(
        "model: {id: ./weights, loras: [{id: ../style}, {id: org/other}]}\n"
        "prompts: [in/*.parquet, s3://bucket/more, hf://datasets/a/b, /abs/x.parquet, sub/]\noutput: out\n"
    )
    assert spec.model.id == str(tmp_path / "weights")
    assert [lora.id for lora in spec.model.loras] == [str(tmp_path.parent / "style"), "org/other"]
    assert spec.prompts.path == (
        f"{tmp_path}/in/*.parquet",
        "s3://bucket/more",
        "hf://datasets/a/b",
        "/abs/x.parquet",
        f"{tmp_path}/sub/",
    )
    assert spec.output.path == str(tmp_path / "here" / "out")


def test_paths_in_overrides_are_relative_to_the_current_folder(load, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    spec = load(MINIMAL, "prompts=other.parquet", "model=./m")
    assert spec.prompts.path == (f"{tmp_path}/here/other.parquet",)
    assert spec.model.id == f"{tmp_path}/here/m"
    assert load(MINIMAL, "prompts.limit=3").prompts.path == (f"{tmp_path}/prompts.parquet",)


def test_a_hub_name_and_the_embedded_model_are_no_paths(load):
    assert load(MINIMAL).model.id == "tiny"
    assert load(MINIMAL.replace("tiny", "org/model")).model.id == "org/model"


@pytest.mark.parametrize(
    ("file", "name"),
    [("night run (2).yaml", "night-run-2-"), ("..yaml", "job"), ("x.y.yml", "x.y"), ("ü.yaml", "job")],
)
def test_the_name_is_the_files(load, file, name):
    assert load(MINIMAL, name=file).name == name


def test_a_given_name_stays(load):
    assert load("name: a7\n" + MINIMAL).name == "a7"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-1", 0.1), ("1E-1", 0.1), (".1", 0.1), ("0.10", 0.1), ("'0.1'", 0.1)],
)
def test_numbers_are_numbers(load, text, value):
    assert load(f"{MINIMAL}sampling: {{delta: {text}}}\n").sampling.delta == value


def test_words_that_yaml_once_took_for_booleans_are_words(load):
    spec = load(
        "name: on\nmodel: {id: no, dtype: float32, revision: '010'}\nprompts: y\noutput: out\nseed: 010\n"
    )
    assert (spec.name, spec.model.id, spec.model.dtype, spec.model.revision) == ("on", "no", "float32", "010")
    assert spec.seed == 10


def test_an_empty_section_is_an_unset_one(load):
    assert load(MINIMAL + "workers:\nsampling:\nname:\n") == load(MINIMAL)


def test_a_pair_of_surrogates_is_the_character_it_means(load):
    """As JSON writes it, which is YAML too."""
    text = json.dumps({"model": "tiny", "prompts": "in/\U0001f600é.parquet", "output": "out \U0001f4f7"})
    assert "\\ud83d\\ude00" in text
    spec = load(text)
    assert spec.prompts.path[0].endswith("/in/\U0001f600é.parquet")
    assert spec.output.path.endswith("/out \U0001f4f7")
    assert JobSpec.from_json(spec.to_json()) == spec
    keyed = load(text[:-1] + ', "sampling": {"call_kwargs": {"\\ud83d\\ude00": 1}}}')
    assert keyed.sampling.call_kwargs == {"\U0001f600": 1}


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "\\ude00\\ud83d", "x\\ud83dx"])
def test_half_a_pair_of_surrogates_is_refused(refusal, half):
    for text in (
        f'model: tiny\nprompts: "{half}.parquet"\noutput: out',
        f'model: tiny\nprompts: a\noutput: out\nsampling: {{call_kwargs: {{"{half}": 1}}}}',
    ):
        assert "has half a character, which is not valid Unicode" in refusal(text)


def test_small_aliases_work(load):
    spec = load("model: tiny\nprompts: &p [a.parquet]\noutput: out\nsampling: {call_kwargs: {again: *p}}\n")
    assert spec.sampling.call_kwargs == {"again": ["a.parquet"]}


# What is refused, and where


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MINIMAL + "sampling:\n  mode: dct\n  deltaa: 0.1\n",
            "job.yaml:6: sampling.deltaa: unknown key; did you mean delta?",
        ),
        (
            MINIMAL.replace(": out", ": a/" + "é" * 128),
            "job.yaml:3: output: is longer than disks take: 255 bytes a",
        ),
        (MINIMAL + "delta: 0.1\n", "job.yaml:4: delta: unknown key; did you mean sampling.delta?"),
        (MINIMAL + "promts: x\n", "job.yaml:4: promts: unknown key; did you mean prompts?"),
        (  # `format` is a key of two other sections: neither is what was meant
            MINIMAL.replace("output: out", "output: {path: out, image: {format: jpg}}"),
            "job.yaml:3: output.image.format: unknown key; known are codec, quality",
        ),
        (
            MINIMAL + "workers: {count: 0, min: 1}\n",  # one mistake, one line
            "job.yaml:4: workers.count: should be 1 or more; got 0",
        ),
        (
            MINIMAL + "shards: {zzz: 1}\n",
            "job.yaml:4: shards.zzz: unknown key; known are rows",
        ),
        (
            MINIMAL.replace("model: tiny", "model: {id: tiny, loras: [{id: x, zzz: 1}]}"),
            "job.yaml:1: model.loras.0.zzz: unknown key; "
            "known are id, weight_name, revision, scale, transformer",
        ),
        (
            MINIMAL.replace("model: tiny", "model: {id: tiny, loras: [{id: x, weightname: y}]}"),
            "job.yaml:1: model.loras.0.weightname: unknown key; did you mean weight_name?",
        ),
        ("model: tiny\noutput: out\n", "job.yaml: prompts: is missing"),
        (MINIMAL.replace("tiny", "{revision: main}"), "job.yaml:1: model.id: is missing"),
        (MINIMAL + "seed: -1\n", "job.yaml:4: seed: should be 0 or more; got -1"),
        (
            MINIMAL + "\n# a comment\n\nsampling:\n  delta: lots\n",
            'job.yaml:8: sampling.delta: should be a number; got "lots"',
        ),
        (
            MINIMAL + "sampling: {scales: autoo}\n",
            "job.yaml:4: sampling.scales: should be 'auto' or a list, as in [a, b]; got \"autoo\"",
        ),
        (
            MINIMAL + "name: ../x\n",
            "job.yaml:4: name: should be letters, digits, `.`, `_` and `-` alone, begun by "
            'a letter or digit, at most 63 characters; got "../x"',
        ),
        (
            MINIMAL + "faults: {max_reject_fraction: 2}\n",
            "job.yaml:4: faults.max_reject_fraction: should be 1 or less; got 2",
        ),
        (
            MINIMAL + "sampling:\n  levels: 1\n  scales: auto\n",
            "job.yaml:4: sampling: give `levels` or `scales`, not both",
        ),
        (MINIMAL + "sampling: 3\n", "job.yaml:4: sampling: must be a section of `key: value` lines"),
        (
            MINIMAL + "prompts: again\n",
            "job.yaml:4: prompts: the key is there twice",
        ),
        (
            MINIMAL + "sampling:\n  delta: 0.1\n  delta: 0.2\n",
            "job.yaml:6: sampling.delta: the key is there twice",
        ),
        (MINIMAL + "sampling:\n\tdelta: 0.1\n", "job.yaml:5: not YAML: a tab; indent with spaces"),
        (MINIMAL + "sampling: {delta: 0.1\nseed: 1\n", "job.yaml:5: not YAML: while parsing a flow mapping"),
        (MINIMAL + "workers: {count: 2, max: 4}\n", "job.yaml:4: workers: give `count`, or `min` and `max`"),
        (MINIMAL + "seed: !!python/name:os.system ''\n", "job.yaml:4: tags like !!python/name:os.system"),
        (MINIMAL + "a: &x {b: 1}\nc: {<<: *x}\n", "job.yaml:5: merge keys (<<) are not supported"),
        (MINIMAL + "a: &x [*x]\n", "job.yaml:4: an alias inside its own anchor"),
        (MINIMAL + "? [a]\n: b\n", "job.yaml:4: a key must be a word"),
        ("- a\n", "job.yaml:1: a spec is made of `key: value` lines"),
        ("tiny", "job.yaml:1: a spec is made of `key: value` lines"),
        ("", "job.yaml is empty"),
        ("# nothing\n", "job.yaml is empty"),
        (MINIMAL + "---\n" + MINIMAL, "job.yaml:4: not YAML: expected a single document"),
        (b"model: \xff\n", "job.yaml is no spec: it is not UTF-8 text"),
        ("model: a\0b\n", "job.yaml: not YAML: "),
        ("a: " * 3 + "[" * 100_000, "job.yaml"),
        (MINIMAL + "prompts2: " + "[" * 3000 + "\n", "job.yaml: not a spec: nested too deeply"),
        (MINIMAL + f"seed: {'9' * 5000}\n", "job.yaml:4: a number of 5,000 digits"),
        (MINIMAL.replace("prompts.parquet", "''"), "job.yaml:2: prompts: is empty"),
        (MINIMAL.replace("prompts.parquet", "[]"), "job.yaml:2: prompts: "),
        (MINIMAL.replace("prompts.parquet", '"a\\0b"'), "job.yaml:2: prompts: holds a NUL character"),
        (
            MINIMAL + "sampling: {scales: [0.5, 0.25]}\n",
            "job.yaml:4: sampling: scales must increase; got [0.5, 0.25]",
        ),
        (MINIMAL + "sampling: {delta: .nan}\n", "job.yaml:4: sampling.delta: "),
        (MINIMAL + "name: a/b\n", "job.yaml:4: name: "),
    ],
)
def test_a_mistake_is_one_line_with_key_and_line(refusal, text, message):
    shown = refusal(text)
    assert shown.startswith(message)
    assert "\n" not in shown


def test_every_mistake_is_named_once(refusal):
    shown = refusal("model: tiny\nprompts: p\noutput: out\nseeed: 1\nworkers: 0\nsampling: {noise: loud}\n")
    assert [line.split(": ")[:2] for line in shown.splitlines()] == [
        ["job.yaml:6", "sampling.noise"],
        ["job.yaml:5", "workers"],
        ["job.yaml:4", "seeed"],
    ]


def test_billions_of_aliases_are_refused_quickly(refusal):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    assert "more than 100,000 values" in refusal(bomb)


def test_a_spec_that_is_not_there(tmp_path):
    with pytest.raises(SpecError, match=r"there is no spec .*nope.yaml"):
        load_spec(tmp_path / "nope.yaml")
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        load_spec(tmp_path)


SECRET = "hunter2-secret"


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL.replace("prompts.parquet", f"s3://key:{SECRET}@bucket/x"),
        MINIMAL.replace("prompts.parquet", f"https://host/x.parquet?X-Amz-Signature={SECRET}"),
        MINIMAL.replace("output: out", f"output: s3://key:{SECRET}@bucket/x"),
        MINIMAL.replace("output: out", f"output: {{path: s3://b/x, endpoint_url: 'http://k:{SECRET}@h:1'}}"),
        MINIMAL + f"aws_secret_access_key: {SECRET}\n",
        MINIMAL.replace("output: out", f"output: {{path: s3://b/x, secret_key: {SECRET}}}"),
    ],
)
def test_credentials_are_refused_and_not_repeated(refusal, text):
    assert SECRET not in refusal(text)
    assert SECRET not in refusal(MINIMAL, f"output=s3://k:{SECRET}@b/x", f"oputput=s3://k:{SECRET}@b/x")


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_any_text_is_a_spec_or_a_spec_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SpecError):
        load_spec(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(JobSpec.model_fields)),
    VALUES | st.dictionaries(st.sampled_from(["path", "id", "rows", "count", "scales", "loras"]), VALUES),
)
def test_any_value_under_any_key_is_a_spec_or_a_spec_error(tmp_path_factory, key, value):
    data = {"model": "tiny", "prompts": "p.parquet", "output": "out", key: value}
    path = tmp_path_factory.getbasetemp() / "values.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True))
    try:
        spec = load_spec(path)
    except SpecError:
        return
    assert JobSpec.from_json(spec.to_json()) == spec


# Overrides


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("sampling.delta=0.1", lambda spec: spec.sampling.delta, 0.1),
        ("seed=9", lambda spec: spec.seed, 9),
        ("workers.count=2", lambda spec: (spec.workers.min, spec.workers.max), (2, 2)),
        (
            "workers.max=7",
            lambda spec: (spec.workers.count, spec.workers.min, spec.workers.max),
            (None, 1, 7),
        ),
        ("workers.batch_size=3", lambda spec: (spec.workers.batch_size, spec.workers.count), (3, 4)),
        ("workers={min: 2, max: 3}", lambda spec: (spec.workers.min, spec.workers.max), (2, 3)),
        ("sampling.levels=2", lambda spec: (spec.sampling.levels, spec.sampling.scales), (2, None)),
        ("sampling.scales=[0.25, 1.0]", lambda spec: spec.sampling.scales, (0.25, 1.0)),
        (
            "output.image.codec=webp",
            lambda spec: (spec.output.image.codec, spec.output.image.quality),
            ("webp", 90),
        ),
        ("output=s3://bucket/x", lambda spec: spec.output.path, "s3://bucket/x"),
        ("prompts.columns.prompt=text", lambda spec: spec.prompts.column("prompt"), "text"),
        ("prompts=/in/*.parquet", lambda spec: spec.prompts.path, ("/in/*.parquet",)),
        ("prompts=[/a.parquet, /b.parquet]", lambda spec: spec.prompts.path, ("/a.parquet", "/b.parquet")),
        ("model.revision=1234567", lambda spec: spec.model.revision, None),
        ("name='1: x'", lambda spec: spec.name, None),
        ("name=", lambda spec: spec.name, "job"),
    ],
)
def test_overrides(load, override, get, value):
    text = MINIMAL + "workers: 4\nsampling: {scales: auto}\n"
    if value is None:
        with pytest.raises(SpecError, match=f"--set {override.partition('=')[0]}"):
            load(text, override)
    else:
        assert get(load(text, override)) == value


def test_later_overrides_win(load):
    assert load(MINIMAL, "seed=1", "seed=2").seed == 2
    assert load(MINIMAL, "workers.min=2", "workers.max=5", "workers.count=3").workers.max == 3


def test_the_star_of_a_glob_is_no_yaml_alias(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(MINIMAL, "prompts=*.parquet").prompts.path == (f"{tmp_path}/*.parquet",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.deltaa=1", "--set sampling.deltaa: sampling.deltaa: unknown key; did you mean delta?"),
        ("seed", "--set seed: write it as key=value"),
        ("=1", "--set : write it as key=value"),
        ("a..b=1", "--set a..b: write it as key=value"),
        ("seed.x=1", "--set seed.x: seed is not a section"),
        ("prompts.path.x.y=1", "--set prompts.path.x.y: prompts.path is not a section"),
        ("sampling.scales=[0.5", "--set sampling.scales: not YAML"),
        ("seed=1\nshards: 3", "--set seed: seed: should be a whole number"),
    ],
)
def test_a_wrong_override_is_named(refusal, override, message):
    assert refusal(MINIMAL + "seed: 1\n", override).startswith(message)


# As data


def test_json_is_canonical_and_comes_back(load):
    spec = load(MINIMAL, "sampling.scales=[0.5, 1]", "workers=3", "output.image={codec: webp}")
    again = JobSpec.from_json(spec.to_json())
    assert again == spec
    assert again.to_json() == spec.to_json()
    assert again.samples() == spec.samples()
    assert list(json.loads(spec.to_json())) == sorted(json.loads(spec.to_json()))


def test_keys_that_came_later_say_nothing_where_they_are_unset(load):
    """A job that was begun before there was the key has the fingerprint that it had."""
    text = MINIMAL.replace("tiny", "{id: org/model, loras: [{id: org/style}]}")
    before = {"id": "org/style", "weight_name": None, "revision": None, "scale": 1.0}
    keys = ["id", "revision", "dtype", "family", "quantize", "loras"]
    spec = load(text)
    assert list(spec.samples()["model"]) == keys
    assert spec.samples()["model"]["loras"] == [before]
    new = ("variant", "attention", "graphs", "cache_stages")
    assert not any(f'"{key}"' in spec.to_json() for key in new)
    later = load(text.replace("org/style", "org/style, transformer: both"), "model.variant=fp16")
    assert later.samples()["model"]["variant"] == "fp16"
    assert later.samples()["model"]["loras"] == [before | {"transformer": "both"}]
    assert JobSpec.from_json(later.to_json()) == later
    faster = load(text, "workers.graphs=auto")
    assert faster.samples() == spec.samples()  # a speed alone
    assert JobSpec.from_json(faster.to_json()).workers.graphs == "auto"
    other = load(text, "sampling.cache=magcache", "sampling.cache_stages=full", "model.attention=sage")
    assert other.samples()["model"]["attention"] == "sage"
    assert other.samples()["sampling"]["cache_stages"] == "full"
    assert {"cache_ratios", "cache_max_skip"}.isdisjoint(other.samples()["sampling"])


def test_the_fingerprint_of_a_job_without_consistency_is_what_it_was(load):
    """A key that came later: at its default it is left out, else jobs begun before would be refused."""
    assert "consistency" not in load(MINIMAL).samples()["sampling"]
    assert "consistency" not in load(MINIMAL).to_json()  # nor could an older version read it
    measured = load(MINIMAL, "sampling.consistency=[[0.5, 0.8, 0.13]]")
    assert measured.samples()["sampling"]["consistency"] == [[0.5, 0.8, 0.13]]
    assert JobSpec.from_json(measured.to_json()) == measured


@pytest.mark.parametrize(
    ("model", "transformer", "message"),
    [
        (
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            None,
            r"loras\[1\]\.transformer is unset.*transformer, transformer_2, both",
        ),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "both", None),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "transformer_2", None),
        (
            "black-forest-labs/FLUX.1-dev",
            "both",
            r"transformer is both, and black-forest-labs/FLUX.1-dev has transf",
        ),
        ("black-forest-labs/FLUX.1-dev", None, None),
        ("black-forest-labs/FLUX.1-dev", "transformer", None),
    ],
)
def test_an_adapter_for_one_of_two_transformers_is_checked_without_the_model(model, transformer, message):
    first = "both" if "Wan" in model else "transformer"
    loras = [{"id": "org/a", "transformer": first}, {"id": "org/b", "transformer": transformer}]
    spec = JobSpec.model_validate({"model": {"id": model, "loras": loras}, "prompts": "a", "output": "b"})
    if message is None:
        checkpoint_of(spec)
    else:
        with pytest.raises(SpecError, match=message):
            checkpoint_of(spec)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": "tiny"}', '{"later": 1}'])
def test_a_damaged_json_is_a_spec_error(text):
    with pytest.raises(SpecError, match=r"_job/spec\.json"):
        JobSpec.from_json(text)


def test_what_is_about_speed_is_not_in_the_samples(load):
    fast = load(MINIMAL, "workers=64", "model.offload=model", "shards=7", "faults.max_attempts=9")
    assert fast.samples() == load(MINIMAL).samples()
    assert load(MINIMAL, "seed=1").samples() != load(MINIMAL).samples()
    assert load(MINIMAL, "prompts.keep=[a]").samples() != load(MINIMAL).samples()


def test_the_schema_describes_every_key_and_accepts_what_load_spec_does():
    schema = spec_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for name, section in {"job": schema, **schema["$defs"]}.items():
        for key, prop in section["properties"].items():
            described = (
                prop.get("description") or schema["$defs"][prop["$ref"].rpartition("/")[2]]["description"]
            )
            assert described, f"{name}.{key}"
            has_default = "default" in prop or prop.get("type") == "object"
            assert has_default or key in section.get("required", []), f"{name}.{key} has no default"
    validator = jsonschema.Draft202012Validator(schema)
    for path in sorted((ROOT / "manifests").glob("*.yaml")):
        data = yaml.safe_load(path.read_text()) if path.name == "quickstart.yaml" else None
        if data is not None:
            validator.validate(data)
    validator.validate(
        {"model": {"id": "tiny"}, "prompts": ["a", "b"], "output": "out", "workers": {"min": 2}}
    )
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"model": "tiny", "prompts": "a", "output": "out", "promts": 1})


def test_the_reference_has_a_line_for_every_key():
    text = spec_reference_markdown()
    schema = spec_schema()
    for section in (schema, *schema["$defs"].values()):
        for key in section["properties"]:
            line = next(line for line in text.splitlines() if line.startswith(f"| `{key}` |"))
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 4, line
            assert cells[1], line
            assert cells[3], line
    assert "### `output.image`" in text
    assert "`dct_rewind`: the same" in text  # the settings' own docstrings


def test_a_saved_spectrum_is_read_into_the_spec(load, refusal, tmp_path):
    (tmp_path / "mine.json").write_text('{"amplitude": 12.5, "beta": 1.75, "r2": 0.99}')
    spec = load(MINIMAL + "sampling:\n  spectrum: mine.json\n")
    assert spec.sampling.spectrum == (12.5, 1.75)
    assert spec == load(MINIMAL + "sampling:\n  spectrum: [12.5, 1.75]\n")
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        message = refusal(MINIMAL + f"sampling:\n  spectrum: {name}\n")
        assert name in message
        assert ":5: sampling.spectrum" in message
