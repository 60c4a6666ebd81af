"""Rows of tables of language models against the models' own eager attention, run by transformers itself.

The oracle asks transformers for attentions and hidden states of a plain forward pass and applies the definitions of
`brute` to them, so it shares with the code neither how attention is captured nor what is computed from it.
"""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from tests.studies.attention import brute, tiny_models

from jacnorm.data.prepare import prepare
from jacnorm.data.read import read_text
from jacnorm.files import read_table
from jacnorm.settings import flags
from jacnorm.step import run
from jacnorm.studies.attention import language, measure_probing
from jacnorm.studies.attention.language import Kept, Shape
from jacnorm.studies.attention.measure_probing import probed, probing
from jacnorm.studies.attention.settings import ProbingSettings
from jacnorm.studies.attention.tables import COLUMNS, MEASURED

torch.set_num_threads(1)
SETTINGS = ProbingSettings(
    seeds=[10, 11],
    layers=2,
    heads=2,
    width=8,
    context=16,
    vocabulary=tiny_models.VOCABULARY,
    lengths=[8, 16],
    distance_selected=2,
    selected=[1, 3, 15],
    fractions=[0.5, 0.9],
    temperatures=[0.1, 1.0],
    perturbations=[0.1],
    subsets=3,
    subset_rows=4,
    gradient_rows=4,
    normalisers=["softmax", "sparsemax"],
)
LABELS = {"seed": 10, "data_set": "python_docs", "model": "trained"}
GIVEN = {"spaces": ["embedding", "layer_input", "value", "wte"], "lengths": [12]}


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("JACNORM_WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "python_docs.safetensors"
    prepare("python_docs", path)
    return path


def parameters(shape, count):
    """Parameters of random models with uneven attention, stacked."""
    found = []
    for seed in range(count):
        model = language.gpt2(shape)
        language.initialise(model, torch.Generator().manual_seed(seed))
        found.append({name: 8 * value.detach() for name, value in model.named_parameters()})
    return {name: torch.stack([each[name] for each in found]) for name in found[0]}


def keep(folder, text, **changes):
    """What a training step might have kept; its path."""
    shape = Shape.of(SETTINGS)
    given = read_text(text)
    own = {"trained": parameters(shape, 2), "untrained": parameters(shape, 2)}
    kept = Kept(given.name, given.label, given.digest, [10, 11], tiny_models.ids(2, 1, 16), shape=shape, parameters=own)
    path = folder / "probing.safetensors"
    language.save(path, [Kept(**{**vars(kept), **changes})])
    return path


def call(settings, folder: Path, text, weights) -> dict[str, pd.DataFrame]:
    """The command as a rule would call it; its tables."""
    before = torch.get_deterministic_debug_mode()
    words = ["--device", "cpu", "--tables", folder, "--data", text, "--weights", weights]
    try:
        run({"probing": probing}, [*map(str, words), *flags(settings).split()])
    finally:
        torch.set_deterministic_debug_mode(before)  # a job switches it on for its process, and this one goes on
    return {path.stem.rpartition("-s")[0]: read_table(path) for path in folder.glob("*.parquet")}


@pytest.fixture(scope="module")
def weights(text, tmp_path_factory):
    return keep(tmp_path_factory.mktemp("weights"), text)


@pytest.fixture(scope="module")
def tables(text, weights, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACNORM_WANDB_MODE", "disabled")
        return call(SETTINGS, tmp_path_factory.mktemp("tables"), text, weights)


def own_pass(model, ids):
    """Attentions, inputs of layers and wte vectors by transformers, without our attention function."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model.eval()(ids[None], output_attentions=True, output_hidden_states=True)
    wte = model.get_input_embeddings().weight.detach()[ids]
    return [each[0].double() for each in output.attentions], [each[0].double() for each in output.hidden_states], wte


def unit(x):
    return torch.nn.functional.normalize(x.double(), dim=-1).numpy()


def frame(model, windows, settings, table):
    return pd.DataFrame([row for name, row in probed(model, windows, settings, LABELS) if name == table])


# --- the command -----------------------------------------------------------------------------------------------------


def test_every_table_is_written_and_whole(tables):
    assert set(tables) == set(MEASURED)
    for name, table in tables.items():
        assert list(table) == list(COLUMNS[name])
        assert table.drop(columns=[c for c in table if "sampl" in c]).notna().all(axis=None)
        heads = set(table[["seed", "layer", "head"]].drop_duplicates().itertuples(index=False, name=None))
        assert heads == {(seed, layer, head) for seed in (10, 11) for layer in (1, 2) for head in (1, 2)}
        kinds = set(table[["model", "normaliser"]].drop_duplicates().itertuples(index=False, name=None))
        assert kinds == {("trained", "softmax"), ("trained", "sparsemax"), ("untrained", "softmax")}
    distances = tables["distances"]
    assert set(distances[distances.normaliser == "softmax"].space) == set(SETTINGS.spaces)
    assert set(distances[distances.normaliser == "sparsemax"].space) == {"embedding"}
    sampled = (distances.space == "embedding") & (distances.normaliser == "softmax")
    once = sampled & ~distances.selected.isin([1, 2, 3])
    assert distances.expectation_sampled.notna().equals(sampled)
    assert set(distances[once].length) == {16}  # N = 15 needs 16 keys
    for length in (8, 16):
        rows = distances[(distances.length == length) & (distances.selected == 3)]
        assert set(zip(rows.rows, rows.skipped_rows, strict=True)) == {(length - 3, 3)}
    assert set(tables["weights"].length) == {8, 16}
    assert set(tables["collapse"].rows) == {4}  # the last quarter of 16


def test_a_seed_alone_gives_the_same_rows(tables, text, tmp_path):
    shape = Shape.of(SETTINGS)
    windows = tiny_models.ids(2, 1, 16)
    one = {
        stage: {name: values[1:] for name, values in parameters(shape, 2).items()} for stage in ("trained", "untrained")
    }
    weights = keep(tmp_path, text, seeds=[11], windows=windows[1:], parameters=one)
    alone = call(SETTINGS.model_copy(update={"seeds": [11]}), tmp_path, text, weights)
    for name, table in tables.items():
        pd.testing.assert_frame_equal(alone[name], table[table.seed == 11].reset_index(drop=True))


def test_a_diverged_model_has_no_values_and_leaves_the_others_theirs(tables, text, tmp_path):
    broken = parameters(Shape.of(SETTINGS), 2)
    next(iter(broken.values()))[1] = math.nan
    weights = keep(tmp_path, text, parameters={"trained": broken, "untrained": parameters(Shape.of(SETTINGS), 2)})
    found = call(SETTINGS, tmp_path, text, weights)
    for name, table in tables.items():
        lost = (table.seed == 11) & (table.model == "trained")
        pd.testing.assert_frame_equal(found[name][~lost], table[~lost])
        cell = [c for c in table if c in ("seed", "model", "head", "length", "selected", "rows", "temperature")]
        pd.testing.assert_frame_equal(found[name].loc[lost, cell], table.loc[lost, cell])
        numbers = table.select_dtypes("float").columns.difference(["temperature", "perturbation", "fraction"])
        assert found[name].loc[lost, numbers].isna().all(axis=None)


def test_weights_of_other_seeds_or_windows_are_refused(text, weights, tmp_path, capsys):
    for changes in ({"seeds": [12, 13]}, {"windows": 2}, {"lengths": [8]}):
        with pytest.raises(SystemExit) as stop:
            call(SETTINGS.model_copy(update=changes), tmp_path, text, weights)
        assert stop.value.code == 2
        assert "run the training step again" in capsys.readouterr().err


def test_weights_of_another_text_are_refused(text, tmp_path, capsys):
    weights = keep(tmp_path, text, digest="0" * 64)
    with pytest.raises(SystemExit) as stop:
        call(SETTINGS, tmp_path, text, weights)
    assert stop.value.code == 2
    assert "belongs to the texts python_docs as they were, but the data are python_docs" in capsys.readouterr().err


# --- one model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["GPT-2", "Llama", "GPT-NeoX"])
def test_rows_are_those_of_the_models_own_attention(family):
    model = tiny_models.made(tiny_models.FAMILIES[family])
    ids = tiny_models.ids(12)
    settings = SETTINGS.model_copy(update=GIVEN | {"normalisers": ["softmax"]})
    found = list(probed(model, ids[None], settings, LABELS))
    attentions, hidden, wte = own_pass(model, ids)
    distances, separability, sizes = (
        pd.DataFrame([row for name, row in found if name == table])
        for table in ("distances", "separability", "weights")
    )
    assert sizes.layer.nunique() == 3
    assert sizes["head"].nunique() == 4
    for layer, head in ((1, 1), (3, 4)):
        alpha = attentions[layer - 1][head - 1]
        own = f"layer == {layer} and head == {head}"
        assert sizes.query(own).largest_weight.item() == pytest.approx(alpha.amax(-1).mean().item(), rel=1e-5)
        assert sizes.query(own).within.item() == 1
        for space, x in (("embedding", hidden[0]), ("layer_input", hidden[layer - 1]), ("wte", wte)):
            for n in (1, 3):
                rows = [brute.row(alpha[t, : t + 1].numpy(), unit(x)[: t + 1], t + 1, n) for t in range(n, 12)]
                expected = pd.DataFrame(rows).mean()
                cell = f"{own} and space == '{space}' and selected == {n}"
                got = distances.query(cell).iloc[0]
                names = ["distance", "bound", "loose_bound", "expectation", "expectation_all"]
                assert got[names].tolist() == pytest.approx(expected[names].tolist(), rel=1e-4)
                got = separability.query(cell).iloc[0]
                names = ["radius", "upper"]
                assert got[names].tolist() == pytest.approx(expected[names].tolist(), rel=1e-4)
                assert got.ratio == pytest.approx(expected.ratio, abs=1e-4)


def test_value_vectors_are_those_that_the_weights_average():
    model = tiny_models.made(tiny_models.gpt2)
    ids = tiny_models.ids(12)
    settings = SETTINGS.model_copy(update=GIVEN | {"spaces": ["value"], "normalised": False})
    got = frame(model, ids[None], settings, "distances")
    attentions, hidden, _ = own_pass(model, ids)
    block = model.transformer.h[1]
    with torch.no_grad():
        values = block.attn.c_attn(block.ln_1(hidden[1].float()))[:, 2 * 32 :]  # (L, d): queries, keys, values
    x = values[:, 8:16].double().numpy()  # the second of four heads
    rows = [brute.row(attentions[1][1][t, : t + 1].numpy(), x[: t + 1], t + 1, 3) for t in range(3, 12)]
    cell = "layer == 2 and head == 2 and selected == 3 and normaliser == 'softmax'"
    assert got.query(cell).distance.item() == pytest.approx(pd.DataFrame(rows).distance.mean(), rel=1e-4)
    assert got.query(cell).bound.item() == pytest.approx(pd.DataFrame(rows).bound.mean(), rel=1e-4)


@pytest.mark.parametrize("keys", ["visible", "all"])
def test_a_shorter_length_is_a_pass_over_the_head_of_the_window(keys):
    model = tiny_models.made(tiny_models.gpt2)
    ids = tiny_models.ids(12)
    both, short = (
        SETTINGS.model_copy(update={"keys": keys, "lengths": lengths, "selected": [1, 3], "subset_rows": 7})
        for lengths in ([7, 12], [7])
    )
    for table in ("distances", "separability", "weights"):
        whole = frame(model, ids[None], both, table).query("length == 7").reset_index(drop=True)
        head = frame(model, ids[None, :7], short, table)
        pd.testing.assert_frame_equal(whole, head, rtol=1e-4, atol=1e-6)


def test_all_keys_of_the_window_may_count():
    model = tiny_models.made(tiny_models.gpt2)
    ids = tiny_models.ids(12)
    settings = SETTINGS.model_copy(update=GIVEN | {"keys": "all"})
    got = frame(model, ids[None], settings, "distances").query("space == 'embedding' and normaliser == 'softmax'")
    attentions, hidden, _ = own_pass(model, ids)
    rows = [brute.row(attentions[2][1][t].numpy(), unit(hidden[0]), t + 1, 3) for t in range(3, 12)]
    one = got.query("layer == 3 and head == 2 and selected == 3").iloc[0]
    expected = pd.DataFrame(rows).mean()
    names = ["distance", "bound", "loose_bound", "expectation", "expectation_all"]
    assert one[names].tolist() == pytest.approx(expected[names].tolist(), rel=1e-4)
    assert (one.rows, one.skipped_rows) == (9, 3)


def test_raw_logits_have_the_temperature_of_the_model():
    model = tiny_models.made(tiny_models.gpt2)
    ids = tiny_models.ids(1, 12)
    t = math.sqrt(8)  # the root of a head's width
    scaled = SETTINGS.model_copy(update=GIVEN | {"temperatures": [1.0]})
    raw = SETTINGS.model_copy(update=GIVEN | {"temperatures": [t], "scaled": False})
    for table in ("weights", "separability", "collapse"):
        pd.testing.assert_frame_equal(frame(model, ids, scaled, table), frame(model, ids, raw, table), rtol=1e-6)
    a, b = (frame(model, ids, each, "jacobians") for each in (scaled, raw))
    assert (a.spectral / t).tolist() == pytest.approx(b.spectral.tolist(), rel=1e-6)


def test_windows_are_averaged():
    model = tiny_models.made(tiny_models.gpt2)
    ids = tiny_models.ids(2, 12)
    settings = SETTINGS.model_copy(update=GIVEN)
    both, first, second = (frame(model, each, settings, "distances") for each in (ids, ids[:1], ids[1:]))
    assert both.distance.tolist() == pytest.approx(((first.distance + second.distance) / 2).tolist())
    assert (both.rows == 2 * first.rows).all()


def test_rows_do_not_depend_on_how_many_heads_are_measured_at_once(monkeypatch):
    model = tiny_models.made(tiny_models.gpt2)
    ids = tiny_models.ids(1, 12)
    settings = SETTINGS.model_copy(update=GIVEN)
    key = ["layer", "head", "normaliser", "space", "length", "selected"]
    whole = frame(model, ids, settings, "separability").sort_values(key).reset_index(drop=True)
    monkeypatch.setattr(measure_probing, "CHUNK", 1)
    alone = frame(model, ids, settings, "separability").sort_values(key).reset_index(drop=True)
    pd.testing.assert_frame_equal(whole, alone)


def test_a_diverged_model_stays_as_it_is():
    model = tiny_models.made(tiny_models.gpt2)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = math.nan
    before = {name: value.clone() for name, value in model.named_parameters()}
    assert frame(model, tiny_models.ids(1, 12), SETTINGS.model_copy(update=GIVEN), "weights").within.isna().all()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, before[name], equal_nan=True, rtol=0, atol=0)
