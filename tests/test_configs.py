"""The config files say what they hold: they parse, their headers show the command, and the seed systems have exactly
the sizes, steps and settings that are published."""

import re
from dataclasses import asdict, replace

import pytest
import torch
from conftest import ROOT, TOY, log_rows, trained

from convert import settings_to_hf
from inkling.cli import parse, problems
from prepare import write_set
from train import GPT, Config, window_starts

CONFIGS = sorted((ROOT / "config").glob("*.py"))


def settings(name: str) -> Config:
    return Config(**parse(Config, [str(ROOT / "config" / f"{name}.py")], "").values)


def parameters(cfg: Config, vocab_size: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(cfg, vocab_size).parameters())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_its_header_shows_its_command(path):
    assert problems(settings(path.stem)) == []
    header = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))[0]
    assert f"python train.py config/{path.name}" in header
    assert "MEASURED" not in header                     # a place kept for a figure


@pytest.mark.parametrize(("name", "vocab_size", "count"), [
    ("verdict", 50_257, 162_419_712), ("lecture", 65, 209_729), ("tinystories_llama", 32_000, 19_532_032)])
def test_the_seed_systems_have_their_published_sizes(name, vocab_size, count):
    assert parameters(settings(name), vocab_size) == count


def test_verdict_makes_90_updates_that_see_each_of_18_windows_ten_times():
    cfg = settings("verdict")
    updates = int(cfg.max_epochs * (4612 // cfg.block_size) / (cfg.batch_size * cfg.gradient_accumulation_steps))
    assert updates == 90
    for epoch in range(10):
        starts = [start for step in range(9) for start in window_starts(9 * epoch + step, cfg, 4612)]
        covered = {(start + i) % 4612 for start in starts for i in range(256)}
        assert len(starts) == 18
        assert len(covered) == 18 * 256                 # no token twice


def test_verdict_in_toy_size_shows_a_greedy_sample_each_epoch_and_the_overfitting(data_dir, tmp_path, monkeypatch):
    """The config's rhythm on another short text and a small model: the run must say what the lesson is."""
    monkeypatch.chdir(tmp_path)
    cfg = settings("verdict")
    assert (cfg.eval_interval, cfg.sample_interval, cfg.sample_tokens, cfg.sample_temperature) == (5, 9, 50, 0.0)
    assert cfg.sample_start == "Every effort moves you"
    text = "Every effort moves you on. " + (data_dir / "toy.txt").read_text(encoding="utf-8")[:1300]
    (tmp_path / "short.txt").write_text(text, encoding="utf-8")
    write_set(tmp_path / "data" / "short", [tmp_path / "short.txt"], "char", 0.1)
    process = trained(tmp_path / "data", tmp_path / "run", str(ROOT / "config" / "verdict.py"), dataset="short",
                      max_iters=90, eval_interval=5, sample_tokens=5, learning_rate=5e-3, n_embd=64, n_head=4,
                      dropout=0)
    assert process.returncode == 0, process.stderr
    assert [int(step) for step in re.findall(r"sample at step (\d+)", process.stdout)] == list(range(0, 91, 9))
    assert process.stdout.count("Every effort moves you") >= 11
    assert [int(row["step"]) for row in log_rows(tmp_path / "run") if row["val_loss"]] == list(range(0, 91, 5))
    note = next(line for line in process.stdout.splitlines() if line.startswith("note     the val loss has risen"))
    assert "--patience" in note
    assert "dropout" in note
    assert re.search(r"best val loss [\d.]+ at step \d+", process.stdout)


def test_the_layers_of_the_seeds_are_those_of_the_originals():
    verdict, lecture, llama = (settings(name) for name in ("verdict", "lecture", "tinystories_llama"))
    model = GPT(replace(verdict, n_layer=1, n_embd=24), 30)
    block = model.blocks[0]
    assert block.attn.q.bias is None
    assert block.attn.out.bias is not None
    assert block.mlp.up.bias is not None
    assert model.head.bias is None
    assert model.head.weight is not model.wte.weight
    model = GPT(lecture, 65)
    assert model.head.bias is not None
    assert model.blocks[0].attn.q.bias is None
    model = GPT(replace(llama, n_layer=1), 100)
    assert model.blocks[0].attn.k.out_features == 128   # 8 heads of 16
    assert model.blocks[0].mlp.gate.out_features == 768
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    bound = (6 / 256) ** 0.5                            # Kaiming-uniform, fan_in 256, gain sqrt 2
    assert model.wte.weight.abs().max().item() == pytest.approx(bound, rel=1e-2)


def test_portable_is_the_default_recipe_within_the_switches_of_qwen3():
    cfg = settings("portable")
    width = GPT(replace(cfg, n_embd=16, n_head=1), 30).blocks[0].mlp.up.out_features
    assert settings_to_hf(asdict(cfg), width, 30)["model_type"] == "qwen3"
    switches = {"ngrams", "embed_norm", "logit_cap", "shortcuts", "rope_fraction", "mlp"}
    different = {name for name, value in asdict(Config()).items() if value != asdict(cfg)[name]}
    assert different == switches | {"batch_size", "max_iters"}
    assert cfg.batch_size * cfg.max_iters == Config().batch_size * Config().max_iters       # as many tokens


# ---- patience


def test_patience_stops_after_so_many_evaluations_without_a_better_val_loss(data_dir, tmp_path):
    def best_and_last(**more):
        process = trained(data_dir, tmp_path / "run", **TOY | dict(
            max_iters=40, eval_interval=2, sample_tokens=0, learning_rate=0.5, optimizer="adamw", schedule="constant",
            init="gpt2", eval_iters=0) | more)
        assert process.returncode == 0, process.stderr
        rows = [(int(row["step"]), float(row["val_loss"])) for row in log_rows(tmp_path / "run") if row["val_loss"]]
        return min(rows, key=lambda row: row[1])[0], rows[-1][0], process.stdout

    best, last, said = best_and_last(patience=3)
    assert last == best + 6 < 40
    assert "(patience=3)" in said
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert content["step"] == content["evaluated"] == last
    again = best_and_last(init_from="resume")           # stays stopped
    assert again[:2] == (best, last)
    assert best_and_last(init_from="resume", patience=0)[1] == 40
