"""Results: statistics, provenance, files that are whole or refused, published numbers, tables."""

import csv
import errno
import hashlib
import itertools
import json
import math
import os
import re
import struct
import subprocess
import time

import pytest
import torch
from safetensors.torch import save
from torch import nn

from amortised import data, evaluation, imputation, models, results, tables
from amortised.experiments import load_studies, select, state_of
from amortised.results import Estimate, ResultError

ROOT = data.data_folder().parent


def make_record(per_image=None, **changes):
    config = {"epochs": 2, "step_size": 0.2}
    facts = {"commit": "0" * 40, "dirty": False, "versions": {"torch": "2.13.0"}}
    facts |= {"device": {"type": "cpu", "name": "test"}, "data_sha256": {}}
    facts |= {"started": "2001-01-01T00:00:00+00:00", "wall_seconds": 1.5}
    record = {"study": "vae_objectives", "row": "iwae_50", "scale": "smoke", "seed": 0}
    record |= {"config": config, "config_hash": results.config_hash(config), "recipe_version": 1}
    record |= {"status": "done", "metrics": results.summarise(per_image or PER_IMAGE)}
    return record | {"provenance": facts} | changes


PER_IMAGE = {
    "elbo": torch.tensor([-90.125, -92.5, -85.0]),
    "iwae": torch.tensor([-88.25, -91.5, -84.75]),
}


# -------------------------------------------------------------------------- what the project holds

RESULTS = ROOT / "data/results"


def committed(also_failed=False):
    """Paths of the committed results, by name."""
    paths = {f"{path.parent.name}/{path.stem}": path for path in sorted(RESULTS.glob("*/*.json"))}
    kept = ("done", "failed") if also_failed else ("done",)
    return {n: p for n, p in paths.items() if json.loads(p.read_text())["status"] in kept}


def test_every_committed_result_is_whole_and_lies_beside_its_values():
    records = committed(also_failed=True).values()
    for path in records:
        results.load_result(path)  # schema, digest of the values, agreement of both
    expected = {*records, *(path.with_suffix(".safetensors") for path in committed().values())}
    assert {path for path in RESULTS.rglob("*") if path.is_file()} == expected


def test_every_committed_result_is_that_of_a_run_as_it_stands_in_the_file_of_studies():
    runs = {run.name: run for run in select(load_studies())}
    names = committed(also_failed=True).keys()
    unknown = names - runs.keys()
    assert not unknown, f"remove them, or add their row and seed: {unknown}"
    stale = [name for name in names if state_of(runs[name]).word not in ("done", "failed")]
    assert not stale, f"run them again, python -m amortised.experiments run: {stale}"


def test_the_figures_of_the_tables_follow_from_the_values_per_image():
    """Means and standard errors by hand, from the bytes of the file and nothing of the library."""
    for name, path in committed().items():
        record = json.loads(path.read_text())
        content = path.with_suffix(".safetensors").read_bytes()
        assert hashlib.sha256(content).hexdigest() == record["per_image_sha256"], name
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        written = json.loads(header.pop("__metadata__")["amortised"])
        assert written["config_hash"] == record["config_hash"], name
        assert header.keys() == record["metrics"].keys(), name
        for metric, place in header.items():
            begin, stop = (end + offset for offset in place["data_offsets"])
            values = [value for (value,) in struct.iter_unpack("<f", content[begin:stop])]
            n, mean = len(values), math.fsum(values) / len(values)
            se = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
            stated = record["metrics"][metric]
            assert place["dtype"] == "F32" and place["shape"] == [n] and stated["n"] == n
            assert stated["mean"] == pytest.approx(mean, rel=1e-12, abs=1e-12), (name, metric)
            assert stated["se"] == pytest.approx(se, rel=1e-9, abs=1e-12), (name, metric)


def lead(study, row, baseline, metric="ais_ll"):
    """Mean difference over the same images and seeds, over the larger of its two uncertainties: two
    standard errors over images, and the half width of the t-interval over seeds."""
    difference, _ = tables.paired(tables.load_study(study, "laptop"), row, baseline, metric)
    return difference.mean / max(2 * difference.image_se, difference.half_width)


def test_what_chapter_1_says_of_recorded_runs_is_so():
    study = tables.load_study("vae_objectives", "laptop")

    def by_seed(row, baseline, metric="full_is_ll"):
        _, found = tables.paired(study, row, baseline, metric)
        assert len(found) == 3
        return [estimate.mean for estimate in found]

    gains = by_seed("elbo", "elbo_drawn") + by_seed("elbo_slow", "elbo_slow_drawn")
    gains += by_seed("iwae_5", "iwae_5_drawn")
    assert 4 < min(gains) < 5 and 95 < max(gains) < 96
    in_use = [run.record["details"]["active_latents"] for run in study["elbo_drawn"]]
    assert in_use.count(0) == 1
    rate = by_seed("elbo", "elbo_slow")
    assert min(rate) < 0 < max(rate) and max(map(abs, rate)) < 5
    warmup = sorted(by_seed("elbo_warmup", "elbo"))
    assert -26 < warmup[0] < -25 and warmup[1] > 0
    late = study["elbo_warmup"][1].record["details"]
    assert late["active_latents"] == 30
    assert min(by_seed("elbo_5", "elbo")) > 0
    assert all(3.8 < gain < 6 for gain in by_seed("iwae_5", "elbo_5"))
    more = zip(by_seed("dreg_5", "elbo_5"), by_seed("iwae_5", "elbo_5"), strict=True)
    assert all(dreg > iwae for dreg, iwae in more)
    pairs = [("elbo", "elbo_drawn"), ("elbo_slow", "elbo_slow_drawn"), ("iwae_5", "iwae_5_drawn")]
    pairs += [("elbo", "elbo_slow"), ("elbo_warmup", "elbo"), ("elbo_5", "elbo")]
    pairs += [("iwae_5", "elbo_5"), ("dreg_5", "elbo_5"), ("dreg_5", "iwae_5")]
    clear = [pair for pair in pairs if abs(lead("vae_objectives", *pair, "full_is_ll")) > 1]
    assert clear == [pairs[1], pairs[6], pairs[7]]
    for row in ("iwae_5", "dreg_5"):
        assert tables.paired(study, row, "elbo_5", "elbo")[0].mean < 0.05
    mixture = by_seed("mixture_prior", "standard_prior")
    assert (
        min(mixture) < 1 < max(mixture)
        and lead("vae_objectives", "mixture_prior", "standard_prior", "full_is_ll") < 1
    )


def test_what_chapter_5_says_of_teachers_is_so():
    recorded = tables.load_study("many_teachers", "laptop")
    assert {len(runs) for runs in recorded.values()} == {3}
    change = {row: tables.paired(recorded, row, "vae", "hais_ll") for row in recorded}
    assert all(estimate.mean < -23 for estimate in change["langevin_t5"][1])
    assert lead("many_teachers", "langevin_t50", "vae", "hais_ll") < -1
    assert change["langevin_t50"][0].mean < -1
    for row in ("mala_t5", "langevin_t5_short", "mala_t5_short"):
        assert abs(change[row][0].mean) < 2 * change[row][0].image_se < 0.25
    rates = {
        row: tables.pool([run.per_image["teacher_acceptance_rate"] for run in recorded[row]]).mean
        for row in ("mala_t5", "mala_t5_short")
    }
    assert rates["mala_t5"] < 1e-3 and 0.35 < rates["mala_t5_short"] < 0.45


def test_what_chapter_5_says_of_recorded_runs_is_so():
    recorded = tables.load_study("amc_table1", "laptop")
    assert {len(runs) for runs in recorded.values()} == {3}
    assert sum(lead("amc_table1", row, "vae") > 0 for row in recorded if row != "vae") > 7
    _, by_seed = tables.paired(recorded, "persistent_t50", "amc_cnn_g_t50", "ais_ll")
    assert all(estimate.mean > 2 * estimate.se for estimate in by_seed)
    for row, runs in recorded.items():
        gap = tables.pool([run.per_image["simulated_gap"] for run in runs]).mean
        assert (gap > 3) == row.endswith("t50"), (row, gap)
    recorded = tables.load_study("amc_imputation", "laptop")
    assert {row: len(runs) for row, runs in recorded.items()} == dict.fromkeys(recorded, 3)
    for row, kind, score in itertools.product(
        recorded.keys() - {"vae"}, imputation.MASKS, ("label_entropy", "l1")
    ):
        own, reference = f"{kind}_{score}", f"reference_{kind}_{score}"
        values = [run.per_image for run in recorded[row]]
        differences = [v[own] - v[reference] for v in values]
        excess = tables.pool(differences)
        assert excess.mean > 2 * excess.image_se, (row, own, excess)
        assert all(difference.mean() > 0 for difference in differences), (row, own)
        if score == "l1":  # that of the VAE is far smaller
            values = [run.per_image for run in recorded["vae"]]
            own_excess = tables.pool([v[own] - v[reference] for v in values])
            assert 5 * own_excess.mean < excess.mean, (row, own, own_excess, excess)
    weights = [run.record["details"]["reference_ess"] for runs in recorded.values() for run in runs]
    assert max(max(ess.values()) for ess in weights) < 7  # of ten chains


def test_what_chapter_4_says_of_the_learned_ring_is_so():
    """The widest gap among the paths that read x belongs to one of the best learners."""
    study, dims = tables.load_study("ring_learning", "laptop"), (2, 10, 50, 300)
    (diverged,) = tables.load_study("ring_learning", "laptop", status="failed").items()
    assert diverged[0] == "realnvp_always_300" and len(study["realnvp_always_300"]) == 2

    def mean(row, metric):
        return tables.pool([run.per_image[metric] for run in study[row]]).mean

    readers = ("importance", "hvae_free", "langevin", "annealed", "uha")
    for d in dims:
        losses = {kind: mean(f"{kind}_{d}", "loss") for kind in readers}
        gaps = {kind: mean(f"{kind}_{d}", "gap") for kind in readers}
        assert max(losses.values()) < 0.1 and max(gaps, key=gaps.get) == "hvae_free"
        assert gaps["hvae_free"] > 2.6 and max(gaps["langevin"], gaps["uha"]) < 1.5
        if d > 2:
            assert losses["hvae_free"] < min(losses["langevin"], losses["uha"])
        assert all(1 < mean(f"{kind}_{d}", "loss") < 5 for kind in ("mean_field", "realnvp_always"))
    assert lead("ring_learning", "hvae_free_50", "importance_50", "loss") < -1
    for d in (10, 300):
        assert abs(lead("ring_learning", f"hvae_free_{d}", f"importance_{d}", "loss")) < 1


def test_committed_results_belong_to_the_images_they_claim():
    for name, path in committed().items():
        record, per_image = results.load_result(path)
        assert record["provenance"]["data_sha256"] == data.digests("mnist"), name
        assert re.fullmatch("[0-9a-f]{40}", record["provenance"]["commit"] or ""), name
        config = record["config"]
        for metric, values in per_image.items():
            if metric.startswith("simulated_"):
                assert len(values) == config["simulated_pairs"], (name, metric)
            else:  # some metrics are of the first of the images only
                parts = ("images", "hais_images", "diagnostic_images", "svi_images", "num_judged")
                assert len(values) in {config.get(part) for part in parts}, (name, metric)


# -------------------------------------------------------------------------------------- statistics


def test_mean_and_se_match_their_formulas_in_double_precision():
    values = [-80.5, -90.25, -100.0, -70.125]
    mean = sum(values) / 4
    se = math.sqrt(sum((value - mean) ** 2 for value in values) / 3 / 4)
    for given in (values, torch.tensor(values), torch.tensor(values, dtype=torch.float64)):
        assert results.mean_and_se(given) == pytest.approx((mean, se, 4), rel=1e-14)
    assert results.mean_and_se(torch.tensor([1, 2], dtype=torch.bfloat16)) == (1.5, 0.5, 2)
    # A float32 running sum would lose the last digits of a million values near -80.
    values = torch.full((1_000_000,), -80.1, dtype=torch.float32)
    assert results.mean_and_se(values).mean == pytest.approx(values[0].item(), rel=1e-12)


def test_se_covers_the_truth_as_often_as_it_should():
    draws = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0)) * 3 + 7
    estimates = [results.mean_and_se(row) for row in draws]
    covered = sum(abs(estimate.mean - 7) < 2.0096 * estimate.se for estimate in estimates) / 2000
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))  # t, 49 d.o.f.


def test_paired_difference_sees_what_separate_errors_hide():
    generator = torch.Generator().manual_seed(0)
    images = 22 * torch.randn(1000, generator=generator)
    gain = 0.5 + 0.1 * torch.randn(1000, generator=generator)
    paired = results.paired_difference(images + gain, images)
    assert paired == pytest.approx(results.mean_and_se(gain), rel=1e-3)
    assert paired.se < 0.01 < 0.5 < results.mean_and_se(images).se


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0]], "1 entries; a standard error needs at least 2"),
        ([[]], "0 entries"),
        ([torch.zeros(2, 3)], r"shape \(2, 3\); give one value per image"),
        (
            [[0.0, -math.inf, math.nan]],
            "2 values of 3 that are not finite, the first at position 1",
        ),
        ([[0.0] * 100, [0.0] * 200], "a has 100 images and b has 200; pair the same"),
        ([[0.0, math.nan], [0.0, 0.0]], "a holds 1 values"),
    ],
)
def test_statistics_refuse_what_they_cannot_average(values, message):
    with pytest.raises(ValueError, match=message):
        (results.mean_and_se if len(values) == 1 else results.paired_difference)(*values)


# -------------------------------------------------------------------------------------- provenance


def test_config_hash_depends_on_the_settings_and_on_nothing_else():
    config = {"rule": "gan", "T": 5, "layers": [500, 500], "nested": {"eta": 0.2, "mala": False}}
    nested = {"mala": False, "eta": 0.2}
    shuffled = {"nested": nested, "layers": (500.0, 500), "T": 5.0, "rule": "gan"}
    assert results.config_hash(config) == results.config_hash(shuffled)
    text = '{"T":5,"layers":[500,500],"nested":{"eta":0.2,"mala":false},"rule":"gan"}'
    assert results.config_hash(config) == hashlib.sha256(text.encode()).hexdigest()
    variants = [config | {"T": value} for value in (6, "5", True, None)]
    variants += [config | {"layers": [500, 501]}, config | {"nested": nested | {"eta": 0.02}}]
    variants += [{key: value for key, value in config.items() if key != "T"}, config]
    assert len({results.config_hash(variant) for variant in variants}) == len(variants)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ([1], TypeError, "config is a list"),
        ({"a": {1: 2}}, TypeError, r"config = .* the key 1 is no text"),
        ({"a": [0.1, math.nan]}, ValueError, r"config = {'a': \[0.1, nan\]} cannot be JSON"),
        ({"device": torch.device("cpu")}, TypeError, r"config = .* Object of type device"),
    ],
)
def test_config_hash_refuses_what_json_would_bend(config, error, message):
    with pytest.raises(error, match=message):
        results.config_hash(config)


def git(folder, *words):
    subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@localhost", *words],
        check=True,
        capture_output=True,
    )


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The project unpacked into a folder that is no checkout."""
    folder = tmp_path / "unpacked"
    (folder / "data").mkdir(parents=True)
    (folder / "lib").mkdir()
    (folder / "data/registry.toml").write_text((ROOT / "data/registry.toml").read_text())
    (folder / "lib/code.py").write_text("1\n")
    for module in (data, results):
        monkeypatch.setattr(module, "data_folder", lambda: folder / "data")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return folder


def commit_and_dirty():
    facts = results.provenance(started=time.time())
    return facts["commit"], facts["dirty"]


def test_provenance_follows_the_checkout(elsewhere, monkeypatch):
    assert commit_and_dirty() == (None, None)
    git(elsewhere.parent, "init", "-q")
    git(elsewhere.parent, "commit", "-q", "--allow-empty", "-m", "of what surrounds the project")
    assert commit_and_dirty() == (None, None)
    monkeypatch.setenv("AMORTISED_COMMIT", "f" * 40)
    assert commit_and_dirty() == ("f" * 40, None)

    git(elsewhere, "init", "-q")
    git(elsewhere, "add", ".")
    git(elsewhere, "commit", "-q", "-m", "one")
    commit, dirty = commit_and_dirty()
    assert re.fullmatch("[0-9a-f]{40}", commit) and commit != "f" * 40 and dirty is False
    (elsewhere / "data/results").mkdir()
    (elsewhere / "data/results/new.json").write_text("{}")
    assert commit_and_dirty() == (commit, False)  # a result is no code
    (elsewhere / "lib/code.py").write_text("2\n")
    assert commit_and_dirty() == (commit, True)


def test_provenance_names_device_data_and_times():
    started = time.time() - 5
    facts = results.provenance("cpu", started=started, datasets=["mnist", "mnist_static"])
    json.dumps(facts)
    assert facts["device"]["type"] == "cpu" and facts["device"]["name"]
    assert facts["device"]["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"] == torch.__version__
    assert 5 <= facts["wall_seconds"] < 60
    assert facts["started"] == time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(started))
    assert len(facts["data_sha256"]) == 4 + 1 + 3
    assert facts["data_sha256"] == data.digests("mnist", "mnist_static")
    assert results.provenance(started=started, wall_seconds=100)["wall_seconds"] == 100
    results.check_result(make_record(provenance=facts))


# ------------------------------------------------------------------------------------ result files


def test_a_result_survives_the_round_trip_and_is_the_same_bytes_each_time(tmp_path):
    record = make_record(details={"curve": [1.5, 2.5]})
    folders = [tmp_path / "a", tmp_path / "b"]
    path, other = (results.save_result(folder, record, PER_IMAGE) for folder in folders)
    assert path == tmp_path / "a/vae_objectives/iwae_50-smoke-seed0.json"
    values = path.with_suffix(".safetensors")
    assert set(path.parent.iterdir()) == {path, values}
    assert path.read_bytes() == other.read_bytes()
    assert values.read_bytes() == other.with_suffix(".safetensors").read_bytes()
    found = results.load_result(path)
    assert {key: found.record[key] for key in record} == record
    assert found.per_image.keys() == PER_IMAGE.keys()
    for name, values in found.per_image.items():
        assert values.dtype == torch.float32 and torch.equal(values, PER_IMAGE[name])
    assert results.summarise(found.per_image) == found.record["metrics"]


def test_failed_and_scalar_results(tmp_path):
    failed = make_record(status="failed", reason="loss is not finite at step 7", metrics={})
    path = results.save_result(tmp_path, failed)
    assert results.load_result(path).record["reason"].startswith("loss")
    assert not path.with_suffix(".safetensors").exists()
    scalar = make_record(metrics={"label_entropy": {"mean": 0.4, "se": None, "n": 1}})
    assert results.load_result(results.save_result(tmp_path, scalar)).per_image == {}
    invented = make_record()  # its metrics are means of values that are not given
    with pytest.raises(ResultError, match="'elbo' has no values per image"):
        results.save_result(tmp_path, invented)
    # A later run with per-image values and back again leaves no stray file.
    results.save_result(tmp_path, make_record(), PER_IMAGE)
    results.save_result(tmp_path, failed)
    assert results.load_result(path).per_image == {}


def without(key):
    return {name: value for name, value in make_record().items() if name != key}


def with_metric(**changes):
    return make_record(metrics={"elbo": {"mean": -90.0, "se": 1.0, "n": 10} | changes})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (without("seed"), "format:\n  seed is missing"),
        (make_record(sead=1), r"unknown name 'sead' \(known: study, row"),
        (make_record(seed="0"), "seed = '0': input should be a valid integer"),
        (make_record(seed=True), "seed = True: input should be a valid integer"),
        (make_record(seed=-1), "seed = -1: input should be greater than or equal to 0"),
        (make_record(row="../up"), r"row = '\.\./up': string should match pattern"),
        (make_record(study="Table 1"), "study = 'Table 1': string should match pattern"),
        (make_record(recipe_version=0), "recipe_version = 0: input should be greater than 0"),
        (make_record(status="finished"), "status = 'finished': .* 'done' or 'failed'"),
        (make_record(status="failed"), "reason must be stated for a failed run"),
        (make_record(reason="none"), "reason must be stated for a failed run, and for no other"),
        (make_record(metrics={}), "metrics is empty, though status is 'done'"),
        (make_record(config={"epochs": 3}), "config_hash is not that of config, '[0-9a-f]{64}'"),
        (make_record(config={"device": object()}), "config.*device.* cannot be JSON"),
        (with_metric(mean=math.nan), r"metrics\.elbo\.mean = nan: .* finite number"),
        (with_metric(se=-1.0), r"se = -1\.0: input should be greater than or equal to 0"),
        (with_metric(se=None), r"metrics\.elbo: se must be null for a single value"),
        (with_metric(n=1), r"metrics\.elbo: se must be null for a single value, and for no other"),
        (with_metric(n=2.5), r"n = 2\.5: input should be a valid integer"),
        (with_metric(median=1), r"unknown name 'median' \(known: mean, se, n\)"),
        (make_record(provenance={}), "provenance: commit is missing\n  provenance: dirty is"),
        (make_record(seed=-1, row="A"), "row = 'A': .*\n  seed = -1: "),  # all faults at once
    ],
)
def test_a_malformed_record_is_refused_before_anything_is_written(tmp_path, record, message):
    with pytest.raises(ResultError, match=message):
        results.save_result(tmp_path, record)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"elbo": PER_IMAGE["elbo"].double()},
            r"'elbo' is torch\.float64 \[3\], expected a float32",
        ),
        ({"elbo": torch.zeros(3, 1)}, r"torch\.float32 \[3, 1\], expected a float32 tensor \[N\]"),
        ({"elbo": [1.0, 2.0]}, "is list, expected a float32 tensor"),
        ({"hais": torch.zeros(3)}, "'hais' has no metric of its name"),
        ({"elbo": PER_IMAGE["elbo"] + 0.1}, r"metrics\['elbo'\] states .* give"),
        ({"elbo": PER_IMAGE["elbo"][:2]}, r"metrics\['elbo'\] states"),
        ({"elbo": torch.tensor([0.0, math.nan, 1.0])}, "1 values of 3 that are not"),
    ],
)
def test_per_image_values_must_be_those_of_the_metrics(tmp_path, change, message):
    with pytest.raises(ResultError, match=message):
        results.save_result(tmp_path, make_record(), PER_IMAGE | change)
    assert list(tmp_path.iterdir()) == []


def test_damaged_pairs_are_refused(tmp_path):
    path = results.save_result(tmp_path, make_record(), PER_IMAGE)
    values = path.with_suffix(".safetensors")
    record, content = path.read_bytes(), values.read_bytes()
    last = content[:-1] + bytes([content[-1] ^ 1])
    for json_bytes, value_bytes, message in (
        (record, content[:-4], r"seed0\.safetensors has SHA-256 .* expected .*Run this row again"),
        (record, last, "damaged or of another run"),
        (record, None, "are missing. Run this row again"),
        (record[:-20], content, r"seed0\.json: .*Run this row again"),
        (b"[]", content, r"top level = \[\]"),
        (record.replace(b'"mean": -8', b'"mean": -7'), content, "states .* per-image values give"),
        (record.replace(b'"epochs": 2', b'"epochs": 20'), content, "config_hash is not that of"),
    ):
        path.write_bytes(json_bytes)
        values.unlink() if value_bytes is None else values.write_bytes(value_bytes)
        with pytest.raises(ResultError, match=message):
            results.load_result(path)
    other = path.with_name("vae-smoke-seed0.json")
    other.write_bytes(record)
    with pytest.raises(
        ResultError, match=r"is the result vae_objectives/iwae_50-smoke-seed0\.json by its"
    ):
        results.load_result(other)
    with pytest.raises(FileNotFoundError):
        results.load_result(tmp_path / "vae_objectives/none-smoke-seed0.json")


def no_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("call", "number"), [("fsync", 1), ("fsync", 2), ("replace", 1), ("replace", 2), ("replace", 3)]
)
def test_an_interruption_leaves_the_old_result_or_a_pair_that_is_refused(
    tmp_path, monkeypatch, call, number
):
    """A full disk changes nothing, and whatever else happens, no result mixes two runs."""
    path = results.save_result(tmp_path, make_record(), PER_IMAGE)
    later = {name: values + 1 for name, values in PER_IMAGE.items()}
    real, calls = getattr(os, call), []

    def interrupted(*arguments):
        calls.append(arguments)
        return no_space() if len(calls) == number else real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, call, interrupted)
        results.save_result(tmp_path, make_record(later), later)
    assert not [file for file in tmp_path.rglob("*") if file.name.endswith(".tmp")]
    if (call, number) == ("replace", 3):  # the new values are there, and the old record
        with pytest.raises(ResultError, match="of another run"):
            results.load_result(path)
    else:
        assert torch.equal(results.load_result(path).per_image["elbo"], PER_IMAGE["elbo"])
    results.save_result(tmp_path, make_record(later), later)
    assert torch.equal(results.load_result(path).per_image["elbo"], later["elbo"])


# ----------------------------------------------------------------------------------------- weights


class Decoder(nn.Module):
    def __init__(self, latent_dim=4, hidden=8):
        super().__init__()
        self.architecture = {"class": "Decoder", "latent_dim": latent_dim, "hidden": hidden}
        self.net = nn.Sequential(nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, 6))
        self.register_buffer("steps", torch.tensor(3))


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_weights_survive_the_round_trip_and_are_the_same_bytes(tmp_path, dtype):
    decoder, again = Decoder(), Decoder()
    for module in (decoder, again):  # tied weights, too
        module.tied = module.net[2]
    again.steps.fill_(0)
    details = {"provenance": results.provenance(started=time.time()), "epochs": 5}
    paths = [tmp_path / "new/a.safetensors", tmp_path / "new/b.safetensors"]
    for path in paths:
        results.save_weights(path, decoder, decoder.architecture, details, dtype=dtype)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    found = results.load_weights(paths[0], again, again.architecture)
    assert found == json.loads(json.dumps(details))
    for name, value in decoder.state_dict().items():
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype).float()
        assert torch.equal(again.state_dict()[name], value)


def test_weights_of_another_architecture_are_refused_by_name(tmp_path):
    path = tmp_path / "a.safetensors"
    results.save_weights(path, Decoder(), Decoder().architecture)
    other = Decoder(latent_dim=5)
    other.extra = nn.Linear(1, 1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ResultError) as caught:
        results.load_weights(path, other, other.architecture | {"noise": "gaussian"})
    message = str(caught.value)
    for fault in (
        "architecture, latent_dim: 4 in the file, 5 in the module",
        "architecture, noise: absent in the file, gaussian in the module",
        "net.0.weight: float32 [8, 4] in the file, float32 [8, 5] in the module",
        "extra.bias: absent in the file, float32 [1] in the module",
    ):
        assert fault in message
    assert "hidden" not in message and "net.2" not in message
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name])
    results.save_weights(path, Decoder().double(), Decoder().architecture)
    with pytest.raises(
        ResultError, match=r"float64 \[8\] in the file, float32 \[8\] in the module"
    ):
        results.load_weights(path, Decoder(), Decoder().architecture)


def test_damaged_or_foreign_weights_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    results.save_weights(path, Decoder(), Decoder().architecture)
    content = path.read_bytes()
    values = results.save_result(tmp_path, make_record(), PER_IMAGE).with_suffix(".safetensors")
    for broken in (content[:-8], content[:20], b"", b"\x80\x04pickle", values.read_bytes()):
        path.write_bytes(broken)
        with pytest.raises(ResultError, match="is damaged or not of this project"):
            results.load_weights(path, Decoder(), Decoder().architecture)
    with pytest.raises(FileNotFoundError):
        results.load_weights(tmp_path / "none.safetensors", Decoder(), {})


@pytest.mark.parametrize(("value", "dtype"), [(math.inf, None), (1e5, torch.float16)])
def test_weights_that_are_not_finite_as_saved_are_a_failure_and_no_file(tmp_path, value, dtype):
    decoder, path = Decoder(), tmp_path / "a.safetensors"
    results.save_weights(path, decoder, decoder.architecture)
    content = path.read_bytes()
    nn.init.constant_(decoder.net[2].bias, value)  # 1e5 is finite, but the largest half is 65504
    message = rf"not finite as {dtype or 'they are'}: net\.2\.bias; nothing is saved"
    with pytest.raises(FloatingPointError, match=message):
        results.save_weights(path, decoder, decoder.architecture, dtype=dtype)
    assert path.read_bytes() == content
    with pytest.raises(TypeError, match=r"architecture.*cannot be JSON"):
        results.save_weights(path, Decoder(), {"class": Decoder})


def flipped(content, bit):
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def test_one_bit_of_a_sealed_file_is_enough_to_refuse_it(tmp_path):
    """Every bit of the digests and of the rest of the metadata, and some of what follows."""
    weights = tmp_path / "a.safetensors"
    results.save_weights(weights, Decoder(), Decoder().architecture, {"study": "vae_objectives"})
    path = results.save_result(tmp_path, make_record(), PER_IMAGE)
    readers = {weights: results.read_weights, path: results.load_result}
    for file, read in readers.items():
        content = file.read_bytes()
        read(file)
        first, rest = range(0, 8 * 200, 3), range(8 * 200, 8 * len(content), 41)
        for bit in (*first, *rest):
            file.write_bytes(flipped(content, bit))
            with pytest.raises(ResultError, match=re.escape(str(file))):
                read(file)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"seed": 0', '"seed": 1, "seed": 0'),  # a key twice, of which JSON keeps the last
        ('"wall_seconds": 2.0', '"wall_seconds": 1.0'),
        ('"commit": null', '"commit": "%s"' % (40 * "0")),
        ('"metrics": {', '"metrics": {"hais": {"mean": -80.0, "se": null, "n": 1}, '),
        ('"details": {}', '"details": {"acceptance": NaN}'),
        ("\n", "\r\n"),
    ],
)
def test_an_edited_result_is_refused(tmp_path, old, new):
    record = make_record(details={})
    record["provenance"] |= {"wall_seconds": 2.0, "commit": None}
    path = results.save_result(tmp_path, record, PER_IMAGE)
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new).encode())
    with pytest.raises(ResultError, match="its digest is not that of its content"):
        results.load_result(path)


def test_a_result_without_a_seal_is_refused(tmp_path):
    path = results.save_result(tmp_path, make_record(), PER_IMAGE)
    path.write_text(re.sub(r'  "sha256": "\w+",\n', "", path.read_text()))
    with pytest.raises(ResultError, match="its digest is not that of its content"):
        results.load_result(path)


def test_every_committed_result_and_file_of_weights_is_sealed():
    """Of an unsealed result made elsewhere: `save_result` it again, and commit that."""
    for path in RESULTS.rglob("*.json"):
        assert "sha256" in results.load_result(path).record, path
    paths = sorted((ROOT / "data/models").rglob("*.safetensors"))
    assert len(paths) > 15 and sum(path.stat().st_size for path in paths) < 20e6
    for path in paths:
        results.read_weights(path)
        is_sealed = b"SHA-256" in path.read_bytes()[:60]
        assert is_sealed or path.with_name(f"{path.name}.sha256").is_file(), path


def test_weights_from_before_there_were_seals_are_vouched_for_by_a_file_beside_them(tmp_path):
    path = tmp_path / "a.safetensors"
    described = json.dumps({"architecture": {"class": "A"}, "details": {}})
    content = save({"weight": torch.ones(3)}, metadata={"amortised": described})
    path.write_bytes(content)
    beside, digest = tmp_path / "a.safetensors.sha256", hashlib.sha256(content).hexdigest()
    beside.write_text(f"{digest}  a.safetensors\n")
    assert results.read_weights(path)[1] == {"class": "A"}
    refused = r"it has no seal, and \w\.safetensors\.sha256 does not vouch for it"
    for name, text in (("a", f"{digest}  b.safetensors"), ("a", digest), ("b", None)):
        path.replace(path := tmp_path / f"{name}.safetensors")
        if text is not None:
            beside.write_text(text)
        with pytest.raises(ResultError, match=refused):
            results.read_weights(path)
    path.replace(path := tmp_path / "a.safetensors")
    beside.write_text(f"{digest}  a.safetensors\n")
    path.write_bytes(content[:-1] + b"\0")
    with pytest.raises(ResultError, match=refused):
        results.read_weights(path)


def test_weights_load_under_the_name_of_their_own_run_alone(tmp_path):
    details = {"study": "s", "row": "vae", "scale": "laptop", "seed": 0, "role": "decoder"}
    for name in (
        "models/s/vae-laptop-seed0-decoder",
        "runs/s/vae-laptop-seed0-1a2b3c4d/decoder",
        "elsewhere/vae-laptop-seed0-decoder",
        "mine",
    ):
        path = tmp_path / f"{name}.safetensors"
        results.save_weights(path, Decoder(), Decoder().architecture, details)
        assert results.read_weights(path)[2] == details
    for name, fault in (
        ("models/t/vae-laptop-seed0-decoder", "study is s"),
        ("models/s/avb-laptop-seed0-decoder", "row is vae"),
        ("models/s/vae-full-seed0-decoder", "scale is laptop"),
        ("models/s/vae-laptop-seed1-decoder", "seed is 0"),
        ("runs/s/vae-laptop-seed0-1a2b3c4d/encoder", "role is decoder"),
    ):
        other = tmp_path / f"{name}.safetensors"
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(path.read_bytes())
        with pytest.raises(ResultError, match=f"holds weights whose {fault}"):
            results.read_weights(other)


def test_weights_of_a_wrapped_module_are_those_of_the_module_within(tmp_path):
    decoder, path = Decoder(), tmp_path / "a.safetensors"
    partly = Decoder()
    partly.load_state_dict(decoder.state_dict())
    partly.net = torch.compile(partly.net)
    both = torch.compile(nn.DataParallel(decoder))
    for wrapped in (torch.compile(decoder), nn.DataParallel(decoder), both, partly):
        again = Decoder()
        results.save_weights(path, wrapped, decoder.architecture)
        results.load_weights(path, again, decoder.architecture)
        for name, value in decoder.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_weights_of_any_type_load_exactly(tmp_path, dtype, default):
    path = tmp_path / "a.safetensors"
    layer = models.ConvBernoulli(2).to(dtype)
    results.save_weights(path, layer, {"class": "ConvBernoulli", "latent_dim": 2})
    torch.set_default_dtype(default)
    try:
        found = evaluation.load_module(path)
    finally:
        torch.set_default_dtype(torch.float32)
    wide = torch.promote_types(dtype, default)
    for value, expected in zip(found.parameters(), layer.parameters(), strict=True):
        assert value.dtype is wide and torch.equal(value, expected.to(wide))


# ------------------------------------------------------------------------------- published numbers

COLUMNS = "paper table row metric value plus_minus unit protocol known_from".split()
KNOWN_FROM = {"paper", "slides", "poster", "author code", "secondary source", "figure reading"}
UNITS = set(
    "nats, nats (natural log assumed), bits per dimension, perplexity, samples of 100, samples of "
    "5000, l1 distance per pixel, squared units, epochs, hours".split(", ")
)
NUMBER = re.compile(r"-?\d+(\.\d+)?")
PUBLISHED = sorted((ROOT / "data/published").glob("*.csv"))


def test_published_numbers_cover_the_books_sources():
    names = {path.stem for path in PUBLISHED}
    assert names == {"ais", "amc", "avb", "hvae", "iterative", "iwae", "mcvae", "others"}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_numbers_have_a_source_a_unit_and_digits(path):
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert rows and list(rows[0]) == COLUMNS
    for number, row in enumerate(rows, start=2):
        place = f"{path.name}:{number}"
        assert None not in row and None not in row.values(), place
        for column in COLUMNS:
            assert row[column] == row[column].strip(), place
            assert row[column] or column == "plus_minus", f"{place}: {column} is empty"
        assert row["known_from"] in KNOWN_FROM, place
        assert row["unit"] in UNITS, place
        assert NUMBER.fullmatch(row["value"]), place
        assert not row["plus_minus"] or NUMBER.fullmatch(row["plus_minus"]), place
        assert not row["plus_minus"].startswith("-"), place
    parsed = results.load_published(path.stem)
    assert len(parsed) == len(rows)
    for row, text in zip(parsed, rows, strict=True):
        assert math.isfinite(row["value"])
        assert (row["plus_minus"] is None) == (text["plus_minus"] == "")


def test_published_table_1_of_amortised_mcmc():
    rows = results.load_published("amc", table="Table 1", metric="HAIS-LL")
    assert len(rows) == 10
    best = max(rows, key=lambda row: row["value"])
    assert (best["row"], best["value"]) == ("CNN-G | AMC T=50 eta=0.02", -78.23)
    (row,) = results.load_published("amc", row="CNN-B", metric="label entropy")
    assert (row["printed"], row["plus_minus"]) == ("0.933 ± 0.0491", 0.0491)


def test_published_numbers_refuse_unknown_names_with_the_choices():
    with pytest.raises(ValueError, match="no published numbers 'amd'; choose from ais, amc"):
        results.load_published("amd")
    with pytest.raises(ValueError, match=r"no column 'method' in amc\.csv; choose from \['paper'"):
        results.load_published("amc", method="VAE")
    with pytest.raises(
        ValueError, match=r"no row of amc\.csv has metric 'LL'; there are \['IS-LL'"
    ):
        results.load_published("amc", metric="LL")


# ------------------------------------------------------------------------------------------ tables


def test_markdown_table_formats_each_kind_of_cell():
    table = results.markdown_table(
        ["method", "K", "LL", "time"],
        [
            ["Gaussian | VAE", 100, Estimate(-80.6412, 0.2249, 10_000), 3.14159],
            ["two\nlines", None, {"mean": 0.5, "se": None, "n": 1}, None],
        ],
    )
    assert table.splitlines() == [
        "| method | K | LL | time |",
        "| :-- | --: | --: | --: |",
        r"| Gaussian \| VAE | 100 | -80.64 ± 0.22 | 3.14 |",
        "| two lines | – | 0.50 | – |",
    ]
    assert table._repr_markdown_() == str(table)
    assert results.markdown_table(["a"], [[1.25]], decimals=1).endswith("| 1.2 |")


def test_no_text_in_a_table_is_a_live_tag():
    table = results.markdown_table(["<b>", "c"], [["<script>alert(1)</script>", 1]])
    assert "<" not in table and "&lt;script>" in table


def test_the_commit_is_that_of_this_repository_whatever_git_is_told(tmp_path, monkeypatch):
    expected = results.provenance(started=0.0)["commit"]
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert results.provenance(started=0.0)["commit"] == expected


def test_markdown_table_refuses_a_ragged_row():
    with pytest.raises(ValueError, match=r"row 1 has 1 cells, the header 2: \['x'\]"):
        results.markdown_table(["a", "b"], [[1, 2], ["x"]])
    with pytest.raises(ValueError, match="header is empty"):
        results.markdown_table([], [])
