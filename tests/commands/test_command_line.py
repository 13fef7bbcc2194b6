"""The command line as a user meets it: what it accepts, and one line for what it does not."""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import tiktoken.load
from safetensors.torch import load_file

from gpt_kit_hf import OptimizerOptions, RunOptions, parse_run_options, run_command
from gpt_kit_hf.commands.main import main
from gpt_kit_hf.errors import CheckpointError, UsageError
from gpt_kit_hf.options.parser import build_options
from gpt_kit_hf.options.training import recipe_options

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=16",
    "--max_position_embeddings=64",
    "--max_length=16",
    "--batch_size=4",
]
SHORT = [
    "--max_steps=2",
    "--encoding=bytes",
    "--use_cpu",
    "--mixed_precision=fp32",
    "--sample_max_new_tokens=4",
    "--report_to=none",
]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("All the world's a stage, and all the men and women merely players.\n" * 20)
    return str(file)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_file: str) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert main(["train", f"--output_dir={folder}", f"--text_files={text_file}", *TINY, *SHORT]) == 0
    return folder


def test_options_come_from_file_and_command_line_and_the_latter_wins(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "output_dir: runs/x\ntext_files: [a.txt, b.txt]\nlearning_rate: 1e-4\ntorch_compile: true\n"
        "num_train_epochs: null\nuse_bias: false\nsample_prompt: '--x'\n"
    )
    options = parse_run_options(["--config", str(config), "--learning-rate", "3e-3", "--n_layer=3", "--resume"])
    assert options.text.text_files == ["a.txt", "b.txt"]
    assert options.optimizer.learning_rate == 3e-3
    assert options.training.torch_compile is True
    assert options.training.resume is True
    assert options.training.num_train_epochs is None
    assert options.training.sample_prompt == "--x"
    assert (options.model.n_layer, options.model.use_bias, options.model.n_head) == (3, False, None)


def test_help_explains_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_run_options(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("output_dir", "text_files", "encoding", "n_layer", "stride", "learning_rate", "mixed_precision"):
        assert f"--{name}" in shown
    assert "(default: 0.04; 0.001 with recipe plain)" in shown
    assert "peak learning rate" in shown


BAD_OPTIONS = {
    "missing file": (["--text_files=nowhere.txt"], "text_files 'nowhere.txt': no such file"),
    "stride 0": (["--stride=0"], "stride must lie between 1 and max_length=16, got 0"),
    "stride too large": (["--stride=17"], "stride must lie between 1 and max_length=16, got 17"),
    "above the table": (["--max_length=65"], "max_length=65 is above max_position_embeddings=64"),
    "width and heads": (["--n_head=3"], "n_embd must be divisible by n_head, got 16 and 3"),
    "preset": (["--model=gpt2-smal"], "unknown model preset 'gpt2-smal'; did you mean 'gpt2-small'"),
    "encoding": (["--encoding=gtp2"], "unknown encoding 'gtp2'; did you mean 'gpt2'"),
    "option": (["--learning_rat=1"], "unknown option 'learning_rat'; did you mean 'learning_rate'"),
    "option value": (["--batch_size=many"], "batch_size must be an integer, got 'many'"),
    "choice": (["--lr_scheduler_type=cosin"], "unknown lr_scheduler_type 'cosin'; did you mean 'cosine'"),
    "precision": (["--mixed_precision=fp61"], "unknown mixed_precision 'fp61'; did you mean 'fp16'"),
    "two lengths": (["--num_train_epochs=2"], "max_steps=2 and num_train_epochs=2.0: give one of them"),
    "stray word": (["--use_cpu", "true", "word"], "unexpected argument 'word'"),
    "config": (["--config", "nowhere.yaml"], "config 'nowhere.yaml' cannot be read"),
    "tracker": (["--report_to=wandbb"], "unknown report_to 'wandbb'; did you mean 'wandb'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_a_wrong_option_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path, text_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    code = main(["train", f"--output_dir={folder}", f"--text_files={text_file}", *TINY, *SHORT, *arguments])
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said
    assert not folder.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"a\n\xff\xfe", ":2: not UTF-8"),
        (b"too short", "the text has 9 tokens, fewer than one window"),
    ],
)
def test_a_text_that_cannot_be_trained_on_is_one_line(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    code = main(["train", f"--output_dir={tmp_path / 'run'}", f"--text_files={tmp_path / 'a.txt'}", *TINY, *SHORT])
    said = capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1)
    assert message in said
    assert not (tmp_path / "run").exists()


def test_a_held_out_text_too_short_for_a_window_says_which(
    tmp_path: Path, text_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        f"--output_dir={tmp_path / 'run'}",
        f"--text_files={text_file}",
        *TINY,
        *SHORT,
        "--eval_fraction=0.01",
    ]
    assert main(["train", *arguments]) == 2
    assert "evaluation text" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_or_cannot_be_written_is_refused(
    run: Path, tmp_path: Path, text_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted((file, file.stat().st_mtime_ns) for file in run.rglob("*"))
    assert main(["train", f"--output_dir={run}", f"--text_files={text_file}", *TINY, *SHORT]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert sorted((file, file.stat().st_mtime_ns) for file in run.rglob("*")) == before
    locked = tmp_path / "locked"
    locked.mkdir()
    # A superuser may write anywhere: ask the question that the operating system would answer for others.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and access(path, mode))
    assert main(["train", f"--output_dir={locked / 'run'}", f"--text_files={text_file}", *TINY, *SHORT]) == 2
    assert "is not writable" in capsys.readouterr().err
    assert list(locked.iterdir()) == []


def test_gpt2_without_network_and_cache_says_what_to_set(
    tmp_path: Path, text_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(_: str) -> bytes:
        raise requests.ConnectionError("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(tiktoken.load, "read_file", unreachable)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    arguments = [f"--output_dir={tmp_path / 'run'}", f"--text_files={text_file}", *TINY, *SHORT, "--encoding=gpt2"]
    assert main(["train", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "TIKTOKEN_CACHE_DIR" in said
    assert "bytes" in said


def generate(place: Path | str, *changes: str) -> int:
    return main(["generate", str(place), "--prompt=All the ", "--temperature=1", "--top_k=none", "--seed=1", *changes])


def test_generate_streams_the_prompt_and_its_continuation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def generated(*changes: str) -> tuple[int, str]:
        code = generate(run, "--max_new_tokens=20", *changes)
        return code, capsys.readouterr().out

    code, text = generated()
    assert code == 0
    assert text.startswith("All the ")
    assert len(text) > len("All the \n")
    assert generated() == (0, text)
    assert generated("--seed=2")[1] != text
    assert generated("--max_new_tokens=100", "--overflow=slide")[0] == 0


def test_generate_refuses_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, device, message in (
        (str(run), "cpu", "max_position_embeddings"),
        (str(tmp_path / "none"), "cpu", "no such folder"),
        (str(run), "cuda:99", "device 'cuda:99' cannot be used: "),
    ):
        assert generate(place, "--max_new_tokens=100", f"--device={device}") == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert message in said


def test_generate_refuses_another_models_tokenizer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (mixed / name).write_bytes((run / name).read_bytes())
    config = (run / "config.json").read_text()
    key = '"tokenizer_fingerprint": "'
    at = config.index(key) + len(key)
    (mixed / "config.json").write_text(config[:at] + ("0" if config[at] != "0" else "1") + config[at + 1 :])
    assert generate(mixed, "--max_new_tokens=5") == 2
    assert "fingerprint" in capsys.readouterr().err


def test_each_kind_of_error_has_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> int:
        def command() -> None:
            raise error

        return run_command(command)

    assert raising(UsageError("two\nlines")) == 2
    assert raising(CheckpointError("torn")) == 1
    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "error: two lines\nerror: torn\nerror: interrupted\n"
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        raising(ZeroDivisionError())


def test_the_example_trains_as_its_own_process(tmp_path: Path, text_file: str) -> None:
    command = [
        sys.executable,
        "examples/pretrain.py",
        f"--output_dir={tmp_path / 'run'}",
        f"--text_files={text_file}",
    ]
    ended = subprocess.run([*command, *TINY, *SHORT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "\r" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert load_file(tmp_path / "run" / "model.safetensors")
    again = subprocess.run([*command, *TINY, *SHORT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    # Not the only line: a library that cannot load a part of its own says so there, too.
    assert again.stderr.splitlines()[-1].startswith("error: output_dir")


def test_ci_runs_what_a_user_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert "make test" in script.read_text()


def test_a_recipe_sets_defaults_that_options_win_over(tmp_path: Path) -> None:
    needed = ["--output_dir", "x", "--text_files", "python-stdlib", "--max_steps", "3"]
    plain = parse_run_options([*needed, "--recipe", "plain"]).optimizer
    assert plain == OptimizerOptions()
    fast = parse_run_options([*needed, "--recipe", "fast"]).optimizer
    assert (fast.optimizer, fast.lr_scheduler_type, fast.muon_learning_rate) == ("muon", "linear", 6e-3)
    assert fast.weight_decay == plain.weight_decay
    own = parse_run_options([*needed, "--recipe=fast", "--learning_rate", "1e-3"]).optimizer
    assert (own.optimizer, own.learning_rate) == ("muon", 1e-3)
    config = tmp_path / "config.yaml"
    config.write_text("recipe: fast\nlr_scheduler_type: cosine\n")
    from_file = parse_run_options([*needed, "--config", str(config)]).optimizer
    assert (from_file.optimizer, from_file.lr_scheduler_type) == ("muon", "cosine")
    config.write_text("recipe: plain\n")
    assert parse_run_options([*needed, "--config", str(config)]).optimizer == plain
    with pytest.raises(UsageError, match="unknown recipe 'fsat'; did you mean 'fast'"):
        parse_run_options([*needed, "--recipe", "fsat"])


def test_the_recipe_is_fast_unless_an_optimizer_or_a_model_is_named() -> None:
    needed = ["--output_dir", "x", "--text_files", "python-stdlib", "--max_steps", "3"]
    fast = OptimizerOptions(**recipe_options("fast", vocab_size=4096))
    assert parse_run_options(needed).optimizer == parse_run_options([*needed, "--recipe=auto"]).optimizer == fast
    assert parse_run_options([*needed, "--weight_decay=0.3"]).optimizer == dataclasses.replace(fast, weight_decay=0.3)
    assert parse_run_options([*needed, "--optimizer=adamw"]).optimizer == OptimizerOptions()
    assert parse_run_options([*needed, "--optimizer=muon"]).optimizer == OptimizerOptions(optimizer="muon")
    further = parse_run_options([*needed, "--model_name_or_path=somewhere"])
    assert further.optimizer == OptimizerOptions()
    assert build_options(RunOptions, {"output_dir": "x", "text_files": ["y"]}).optimizer == fast
    # The embeddings of few ids learn more slowly, and those of a model that exists.
    slow = OptimizerOptions(**recipe_options("fast", vocab_size=258))
    assert slow.learning_rate < fast.learning_rate
    stored = ["--output_dir", "x", "--token_files", "a.bin", "--max_steps", "3"]
    for given in (
        [*needed, "--encoding=bytes"], [*needed, "--vocab_size=300"], [*stored, "--encoding=bytes"],
        [*needed, "--model_name_or_path=somewhere", "--recipe=fast"],
    ):  # fmt: skip
        assert parse_run_options(given).optimizer == slow
    for given in ([*needed, "--encoding=gpt2", "--vocab_size=300"], stored, [*needed, "--recipe=fast"]):
        assert parse_run_options(given).optimizer == fast
    with pytest.raises(UsageError, match="recipe=fast has optimizer=muon, and optimizer=adamw is given"):
        parse_run_options([*needed, "--recipe=fast", "--optimizer=adamw"])


def test_a_file_of_all_options_leaves_the_recipe_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed = ["--output_dir", "x", "--text_files", "python-stdlib", "--max_steps", "3"]
    file = tmp_path / "config.yaml"
    for given in ([], ["--recipe=plain"], ["--optimizer=muon"], ["--encoding=bytes"], ["--muon_learning_rate=0.1"]):
        with pytest.raises(SystemExit):
            parse_run_options([*needed, *given, "--print_config"])
        file.write_text(capsys.readouterr().out)
        assert parse_run_options(["--config", str(file)]) == parse_run_options([*needed, *given])
    with pytest.raises(SystemExit):
        parse_run_options([*needed, "--print_config"])
    file.write_text(capsys.readouterr().out)
    assert "\n# optimizer: muon\n" in file.read_text()
    for given in (["--recipe=plain"], ["--optimizer=adamw"], ["--encoding=bytes"]):
        again = parse_run_options(["--config", str(file), *given]).optimizer
        assert again == parse_run_options([*needed, *given]).optimizer
    # Wrong values are refused as elsewhere, also where a recipe would look at them.
    for line, message in (
        ("vocab_size: [300]", "vocab_size must be an integer"), ("recipe: [fast]", "recipe must be text")
    ):  # fmt: skip
        file.write_text(f"{line}\n")
        with pytest.raises(UsageError, match=message):
            parse_run_options([*needed, "--config", str(file)])
