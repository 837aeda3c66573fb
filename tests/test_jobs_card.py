"""The data set card says what is in the folder, and the readers of cards take it at its word."""

from __future__ import annotations

import datetime as dt
import json
import re
from dataclasses import replace

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import DatasetCard
from small_jobs import SIDE_PX, commit_part, finish, prompt_table, small_job, small_part

from overtone.cluster.cli import main
from overtone.jobs.folder import JobFolder
from overtone.jobs.media import encode_media
from overtone.jobs.parts import AttemptFacts, Made, build_part, part_schema, stored_schema
from overtone.jobs.prompts import read_shard
from overtone.jobs.report import card, card_rows, contents, write_card
from overtone.jobs.report.card_header import size_category
from overtone.jobs.retry import find_rejects
from overtone.jobs.status import status
from overtone.jobs.store import open_store
from overtone.jobs.verify import verify


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        import datasets

        yield datasets


def finished(folder, table=None, *, bad=("../row/7",), **settings):
    """A finished job of ten rows, without its card."""
    spec, plan = small_job(folder, prompt_table(10) if table is None else table, **settings)
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan, bad=bad)
    return store, spec, plan


STRANGE = {
    "when": pa.array([dt.datetime(2026, 7, 1)] * 10, pa.timestamp("s")),
    "day": pa.array([dt.date(2026, 7, 1)] * 10),
    "price": pa.array([None] * 10, pa.decimal128(10, 2)),
    "raw": pa.array([b"x"] * 10),
    "long": pa.array(["x"] * 10, pa.large_string()),
    "box": pa.array([[1.0, 2.0]] * 10, pa.list_(pa.float32(), 2)),
    "all_null": pa.nulls(10),
    "nested": pa.array([{"a": [{"b": 1}]}] * 10),
    "kind": pa.array(["x"] * 10).dictionary_encode(),
    'a|b `c` "d"': pa.array([1] * 10, pa.int8()),
}


@pytest.mark.parametrize("columns", [{}, STRANGE])
def test_the_header_has_the_features_of_the_parts(datasets, tmp_path, columns):
    store, spec, plan = finished(tmp_path, prompt_table(10, **columns), latents=bool(columns))
    assert write_card(store, spec, plan)
    header = DatasetCard.load(f"{store.url}/README.md").data
    info = datasets.DatasetInfo._from_yaml_dict(header.dataset_info)
    part = pq.read_schema(f"{store.url}/data/train-00000-of-00003.parquet")
    assert info.features == datasets.Features.from_arrow_schema(part)
    assert info.splits["train"].num_examples == 9
    assert info.download_size == sum(object.size_bytes for object in store.list("data/"))


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_loads_a_folder_with_its_card(datasets, tmp_path, streaming):
    store, spec, plan = finished(tmp_path, prompt_table(10, **STRANGE))
    write_card(store, spec, plan)
    store.put("contact-sheet.png", b"png")
    loaded = datasets.load_dataset(store.url, streaming=streaming, cache_dir=str(tmp_path / "cache"))
    rows = list(loaded["train"])
    assert [row["row_id"] for row in rows] == [f"../row/{i}" for i in range(10) if i != 7]
    assert rows[0]["image"].size == (SIDE_PX, SIDE_PX)
    assert rows[0]["nested"] == {"a": [{"b": 1}]}


def test_class_labels_and_pictures_of_the_input_stay_what_they_were(datasets, tmp_path):
    mine = datasets.Dataset.from_dict({"prompt": ["a", "b"], "kind": [1, 0]})
    mine = mine.cast_column("kind", datasets.ClassLabel(names=["cat", "dog"]))
    mine.to_parquet(str(tmp_path / "mine.parquet"))
    store, spec, plan = finished(tmp_path, pq.read_table(tmp_path / "mine.parquet"), bad=())
    write_card(store, spec, plan)
    loaded = datasets.load_dataset(store.url, cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded.features["kind"] == datasets.ClassLabel(names=["cat", "dog"])
    assert loaded["kind"][:] == [1, 0]


def test_columns_that_datasets_has_no_type_for_leave_the_features_out(tmp_path):
    table = prompt_table(10, map=pa.array([[("a", 1)]] * 10, pa.map_(pa.string(), pa.int32())))
    store, spec, plan = finished(tmp_path, table)
    write_card(store, spec, plan)
    assert "features" not in DatasetCard.load(f"{store.url}/README.md").data.dataset_info


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_loads_tars_with_their_card(datasets, tmp_path, streaming):
    store, spec, plan = finished(
        tmp_path,
        prompt_table(10, **STRANGE),
        bad=[f"../row/{i}" for i in range(4)],
        format="webdataset",
        latents=True,
    )
    write_card(store, spec, plan)  # the first tar has no row
    loaded = datasets.load_dataset(store.url, streaming=streaming, cache_dir=str(tmp_path / "cache"))["train"]
    rows = list(loaded)
    assert [row["json"]["row_id"] for row in rows] == [f"../row/{i}" for i in range(4, 10)]
    assert rows[0]["png"].size == (SIDE_PX, SIDE_PX)
    assert rows[0]["txt"] == "a picture of number 4"
    assert np.array_equal(rows[0]["latents.npy"], np.full((4, 2, 2), 4.0))
    assert rows[0]["json"]["tag"] is None
    assert rows[1]["json"]["tag"] == "tag 2"


def test_the_header_says_what_it_is(tmp_path):
    store, spec, plan = finished(tmp_path)
    write_card(store, spec, plan)
    text = store.read("README.md").decode()
    data = DatasetCard.load(f"{store.url}/README.md").data
    assert data.license == "apache-2.0"
    assert data.task_categories == ["text-to-image"]
    assert data.size_categories == ["n<1K"]
    assert data.configs == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}
    ]
    about = yaml.safe_load(text.split("---\n")[1])["overtone"]
    assert (about["model"], about["rows"], about["rejects"], about["seed"]) == ("tiny", 9, 1, 0)
    assert about["fingerprint"] == plan.fingerprint
    assert DatasetCard(text).content == text


def test_the_body_says_how_it_was_made(tmp_path):
    store, spec, plan = finished(tmp_path, prompt_table(10, **STRANGE))
    text = card(spec, plan, contents(store, plan))
    assert "9 pictures, made from prompts by `tiny` with Overtone" in text
    assert "| input rows | 10, from `prompts.parquet` |" in text
    assert "| `RowError` | 1 |" in text
    assert "| 0 | 2 x 2 | 1 |" in text
    assert "mode: dct_rewind" in text
    assert "the job's seed (0)" in text
    named = re.findall(r"^\| (`+ ?.+? ?`+) \|", text.partition("## Columns")[2], re.MULTILINE)
    assert len(named) == len(stored_schema(part_schema(spec, plan.passthrough)))
    assert '`` a\\|b `c` "d" ``' in named
    assert not re.search(r"\n\n\n|[^\n]\n#", text.partition("---\n")[2].partition("---\n")[2])


def test_what_the_card_tells_to_type_works(datasets, tmp_path, monkeypatch):
    store, spec, plan = finished(tmp_path)
    write_card(store, spec, plan)
    monkeypatch.chdir(store.url)
    text = store.read("README.md").decode()
    for query in re.findall(r"```sql\n(.*?)```", text, re.DOTALL):
        assert duckdb.sql(query).fetchall()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found: dict = {}
    exec(code.replace("path/to/this/folder", store.url), found)
    assert len(found["rows"]) == 9


def test_the_card_of_tars_tells_how_to_read_them(tmp_path, monkeypatch):
    store, spec, plan = finished(tmp_path, format="webdataset", latents=True)
    monkeypatch.chdir(store.url)
    text = card(spec, plan, contents(store, plan))
    assert "Latents are in `000042.latents.npy`." in text
    found: dict = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1], found)
    assert found["row"]["latents.npy"].shape == (4, 2, 2)


def test_the_commits_that_were_loaded_are_in_the_parts_and_on_the_card(tmp_path):
    store, spec, plan = finished(tmp_path, prompt_table(4), bad=())
    assert contents(store, plan).commits == ()
    read = read_shard(spec, plan.files[0], 0, 4)
    facts = AttemptFacts("x", "w0", "cpu", model_commit="ab" * 20)
    part = build_part(
        spec, plan, plan.shard(0), attempt=facts, made=[], rejects=[], passthrough=read.passthrough,
        first_row=0, timings=[],
    )  # fmt: skip
    store.put(part.key, part.data)
    held = contents(store, plan)
    assert held.commits == ("ab" * 20,)
    assert f"| commit | `{'ab' * 20}` |" in card(spec, plan, held)


def test_the_card_names_all_of_an_adapter_and_the_weights(tmp_path):
    store, spec, plan = finished(tmp_path)
    loras = [
        {"id": "org/a", "transformer": "both"},
        {"id": "org/b", "transformer": "transformer_2", "weight_name": "low.safetensors", "scale": 0.5},
        {"id": "org/c", "revision": "v1"},
    ]
    model = {"id": "org/model", "variant": "fp16", "loras": loras}
    held = replace(contents(store, plan), commits=("abc", "def"))
    text = card(spec.model_validate(spec.model_dump() | {"model": model}), plan, held)
    assert "| commit | `abc`, `def` |" in text
    assert "| variant | `fp16` |" in text
    adapters = (
        "`org/a` at 1 in both transformers",
        "`org/b` (`low.safetensors`) at 0.5 in `transformer_2`",
        "`org/c` of revision `v1` at 1",
    )
    assert f"| adapters | {', '.join(adapters)} |" in text


@pytest.mark.parametrize(
    ("model", "licence"),
    [
        ({"id": "tiny"}, {"license": "apache-2.0"}),
        ({"id": "someone/something"}, {"license": "unknown"}),
        ({"id": "tiny", "loras": [{"id": "someone/adapter"}]}, {"license": "unknown"}),
        (
            {"id": "black-forest-labs/FLUX.1-dev"},
            {"license": "other", "license_name": "flux-1-dev-non-commercial-license"},
        ),
    ],
)
def test_a_licence_is_known_or_unknown(tmp_path, model, licence):
    store, spec, plan = finished(tmp_path)
    changed = spec.model_validate(spec.model_dump() | {"model": model})
    header = yaml.safe_load(card(changed, plan, contents(store, plan)).split("---\n")[1])
    assert {key: header.get(key) for key in licence} == licence
    assert ("license_link" in header) == ("license_name" in header)


@pytest.mark.parametrize(
    ("rows", "category"),
    [
        *((0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**9 - 1, "100M<n<1B"), (10**11, "100B<n<1T")),
        (10**12, "n>1T"),
    ],
)
def test_size_categories(rows, category):
    assert size_category(rows) == category


def test_verify_and_status_do_not_trip_over_the_card_and_repair_writes_it(tmp_path):
    store = finished(tmp_path)[0]
    assert verify(store.url).ok  # a card is not needed
    repaired = verify(store.url, repair=True)
    assert (repaired.ok, repaired.wrote_card, card_rows(store)) == (True, True, 9)
    assert "wrote README.md again" in repaired.text()
    again = verify(store.url, repair=True)
    assert (again.ok, again.wrote_card, status(store.url).finished) == (True, False, True)
    assert JobFolder(store).finished() == {0, 1, 2}

    store.put("README.md", store.read("README.md").replace(b"rows: 9", b"rows: 8"))
    wrong = verify(store.url)
    assert [(problem.kind, problem.where) for problem in wrong.problems] == [("wrong_derived", "README.md")]
    assert verify(store.url, repair=True).ok
    assert verify(store.url).ok


def test_a_card_of_somebody_else_stays(tmp_path):
    store, spec, plan = finished(tmp_path)
    for mine in (b"# mine\n", b"---\nlicense: mit\n---\n# mine\n", b"---\n: [\n---\n", b"---\n- x\n---\n"):
        store.put("README.md", mine)
        assert not write_card(store, spec, plan)
        assert verify(store.url, repair=True).ok
        assert store.read("README.md") == mine
    refused = CliRunner().invoke(main, ["card", store.url])
    assert refused.exit_code == 2
    assert "somebody else" in refused.output


def test_the_command_writes_or_prints_the_card_of_a_finished_job(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(10))
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    assert commit_part(store, small_part(spec, plan, 0))
    early = CliRunner().invoke(main, ["card", store.url])
    assert early.exit_code == 2
    assert "1 of 3 shards" in early.output
    for index in (1, 2):
        assert commit_part(store, small_part(spec, plan, index))
    printed = CliRunner().invoke(main, ["card", store.url, "--print"])
    assert printed.exit_code == 0
    assert store.head("README.md") is None
    assert CliRunner().invoke(main, ["card", store.url]).exit_code == 0
    assert store.read("README.md").decode() == printed.output


def test_a_job_of_rejects_alone_has_a_card(tmp_path):
    store, spec, plan = finished(tmp_path, bad=[f"../row/{i}" for i in range(10)])
    assert write_card(store, spec, plan)
    assert card_rows(store) == 0
    assert json.loads(json.dumps(DatasetCard.load(f"{store.url}/README.md").data.to_dict()))


def test_what_a_retry_made_counts_and_its_rejects_are_the_newest(datasets, tmp_path):
    store, spec, plan = finished(tmp_path, bad=["../row/1", "../row/2"])
    write_card(store, spec, plan)
    folder = JobFolder(store)
    retry = folder.begin_retry(find_rejects(folder, spec, plan).retry)
    assert commit_part(store, small_part(spec, plan, 0, retry=retry, bad=["../row/2"]))
    assert [problem.where for problem in verify(store.url).problems] == ["README.md"]  # it counts nine of ten
    assert verify(store.url, repair=True).wrote_card
    text = store.read("README.md").decode()
    assert card_rows(store) == 9
    assert "| `RowError` | 1 |" in text
    assert "| pictures | 9, in 4 parts |" in text
    assert len(datasets.load_dataset(store.url, cache_dir=str(tmp_path / "cache"))["train"]) == 9


def test_the_card_of_videos(datasets, tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(2), video={"fps": 8})
    read = read_shard(spec, plan.files[0], 0, 2)
    data = encode_media(np.zeros((5, SIDE_PX, SIDE_PX, 3), np.uint8), spec.output)
    made = [Made(row, data, SIDE_PX, SIDE_PX, 10, (), 0.0) for row in read.rows]
    part = build_part(
        spec, plan, plan.shard(0), attempt=AttemptFacts("a", "w", "cpu"), made=made, rejects=[],
        passthrough=read.passthrough, first_row=0, timings=[], kind="video",
    )  # fmt: skip
    store = open_store(spec.output.path)
    assert commit_part(store, part)
    assert write_card(store, spec, plan)
    card = DatasetCard.load(f"{store.url}/README.md")
    assert card.data.task_categories == ["text-to-video"]
    assert {"name": "video", "dtype": "video"} in card.data.dataset_info["features"]
    assert "| frames a second | 8 |" in card.text
    loaded = datasets.load_dataset(store.url, cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded.features["video"] == datasets.Video()
    assert loaded.cast_column("video", datasets.Video(decode=False))[0]["video"]["bytes"] == data
