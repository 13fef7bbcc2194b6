"""Help and refusals come before any large library is imported, and importing the package registers the model."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from gpt_kit_hf.commands.main import COMMANDS
from gpt_kit_hf.commands.options_page import options_page
from gpt_kit_hf.options.training import TRACKERS

ROOT = Path(__file__).resolve().parents[2]
# Run one after another in a process: a command line in each argument.
_ANSWERS = """
import contextlib, io, shlex, sys
from gpt_kit_hf.commands.main import main
for line in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(shlex.split(line))
        except SystemExit as ended:
            code = ended.code
    print(line, code, err.getvalue(), sep="|", end="" if err.getvalue() else "\\n")
    large = {"torch", "transformers", "datasets", "numpy", "huggingface_hub"} & sys.modules.keys()
    assert not large, (line, large)
"""
REFUSED = {
    "trian": "unknown command 'trian'; did you mean 'train'?",
    "train --bath_size 3": "unknown option 'bath_size'; did you mean 'batch_size'",
    "train --output_dir x --text_files nowhere.txt": "text_files 'nowhere.txt': no such file",
    "train --output_dir x --text_files 'none/*.txt'": "text_files 'none/*.txt': no such file",
    "train --output_dir x --text_files README.md docs/images": "a PNG image: only text can be",
    "train --output_dir x --text_files python-stdlib --eval_files docs/images/*": "a PNG image",
    "train --output_dir x --text_files README.md --encoding_of_files utf-16-el": "did you mean 'utf-16-le'",
    "train --output_dir x --mixture 1:nowhere.txt": "mixture 'nowhere.txt': no such file",
    "train --output_dir x --text_files python-stdlib --eval_files nope": "eval_files 'nope': no such file",
    "train --output_dir s3://b/run --text_files README.md": "and give the URL as remote_dir",
    "train --output_dir x --text_files README.md --remote_dir bucket/run": "remote_dir 'bucket/run' is not a URL",
    "train --output_dir x --text_files README.md --remote_dir ftp://me:pw@host/r": "'ftp://...@host' has a password",
    "plan --text_files README.md": "budget is missing: give --budget TEXT",
    "plan --text_files README.md --budget 20": "budget='20' must be a time such as 20m",
    "plan --text_files nowhere.txt --budget 20m": "text_files 'nowhere.txt': no such file",
    "train --output_dir x --text_files README.md --budget 3w": "budget='3w' must be a time such as 20m",
    "train --text_files python-stdlib": "output_dir is missing: give --output_dir FOLDER",
    "train --config nowhere.yaml": "config 'nowhere.yaml' cannot be read",
    "train --output_dir x --text_files python-stdlib --model nano-z": "unknown model preset 'nano-z'",
    "finetune --output_dir x --model_name_or_path ./no --rows a": "'./no': no such folder",
    "finetune --output_dir x --model_name_or_path a/b --rows no.json": "rows 'no.json': no such file",
    "tokenize --text_files nowhere.txt": "text_files 'nowhere.txt': no such file",
    "tokenize --text_files README.md --num_shards 2 --shard_index 2": "shard_index=2 must be below num_shards=2",
    "tokenize --text_files README.md --eval_files README.md --streaming": "streaming stores no tokens",
    "inspect no.json": "rows 'no.json': no such file",
    "verify nowhere": "run 'nowhere': no such folder",
    "verify . --replay 3": "replay must be FROM:TO, two step numbers, got '3'",
    "runs nowhere": "folder 'nowhere': no such folder",
    "runs README.md": "folder 'README.md' is a file: give a folder",
    "compare README.md docs": "runs 'README.md' is a file: give the folder of a run",
    "report README.md": "run 'README.md' is a file: give the folder of a run",
    "push README.md a/b": "run 'README.md' is a file: give the folder of a run or model",
    "runs docs": "'docs' holds no run, nor do the folders in it",
    "compare docs README.md": "runs 'docs' holds no run",
    "generate": "model_name_or_path is missing: give MODEL",
    "train --output_dir pyproject.toml --text_files python-stdlib": "output_dir 'pyproject.toml' cannot be made",
    "train --output_dir x --text_files python-stdlib --model_name_or_path ./none": "'./none': no such folder",
    "train --output_dir x --text_files python-stdlib --model_name_or_path a/b --model nano-s": "is for a new model",
    "train --output_dir x --text_files python-stdlib --model_name_or_path a/b --vocab_size 4096": "vocab_size out",
    "train --output_dir x --text_files python-stdlib --allow_changes foo": "unknown changeable option 'foo'",
    "train --output_dir x --text_files python-stdlib --allow_changes text": "allow_changes=text is for resuming a run",
    "train --output_dir x --text_files python-stdlib --n_head 3": "n_embd must be divisible by n_head, got 256 and 3",
    "train --output_dir x --text_files python-stdlib --n_layer 0": "n_layer must be at least 1, got 0",
    "generate .": "'.' holds no model: neither a config.json nor a checkpoint",
    "train --output_dir x --text_files python-stdlib --report_to none wandb": "report_to 'none' cannot be combined",
    "generate /no/model": "'/no/model': no such folder",
    "generate m --temperature -1": "temperature must be at least 0 and finite, got -1.0",
    "chat m --dtype int9": "unknown dtype 'int9'; did you mean 'int8'?",
    "serve m --port 70000": "port must be at least 0 and at most 65535, got 70000",
    "watch": "runs is missing: give RUN",
    "watch README.md": "runs 'README.md' is a file; a run is a folder",
    "watch s3://b/run": "runs 's3://b/run' is a URL",
    "report nowhere": "run 'nowhere': no such folder",
    "report docs": "run 'docs' holds no run",
    "play": "models is missing: give MODEL",
    "play a/b /no/model": "'/no/model': no such folder",
    "play m --port 70000": "port must be at least 0 and at most 65535, got 70000",
    "evaluate m": "give either DATA to score or --tasks",
    "evaluate m a.txt --tasks t": "give either DATA to score or --tasks, not both",
    "evaluate m no.txt": "data 'no.txt': no such file",
    "check m --attention flash": "unknown attention 'flash'",
    "card nowhere": "run 'nowhere': no such folder",
    "push nowhere a/b": "run 'nowhere': no such folder",
    "push .": "give REPO, OWNER/NAME on the Hub",
    "push . a/b --revision x --create_pr": "revision and create_pr: a pull request has a branch of its own",
    "pull a/b": "folder is missing: give FOLDER",
    "convert a b --layout gpt3": "unknown layout 'gpt3'; did you mean 'gpt2'?",
    "export a b --format gguf": "destination must end in .gguf with format=gguf, got 'b'",
    "export a docs --format transformers": "'docs' exists and is not an empty folder; nothing is overwritten",
    "convert a docs --layout gpt2": "destination 'docs' exists and is not an empty folder; nothing is overwritten",
    "pull a/b docs": "folder 'docs' exists and is not an empty folder; nothing is overwritten",
    "export a/b README.md/x/y --format transformers": "README.md' is a file, not a folder",
    "export a/b README.md/x/y.gguf --format gguf": "README.md' is a file, not a folder",
    "convert a/b README.md/x --layout gpt2": "'README.md/x' cannot be written: '",
    "pull a/b README.md/x": "README.md' is a file, not a folder",
    "push . name": "give REPO, OWNER/NAME on the Hub, got 'name'",
    "verify docs": "run 'docs' holds no run",
    "generate m --device gpu": "unknown device 'gpu'; did you mean 'xpu' or 'cpu'",
    "train --output_dir x --text_files python-stdlib --report_to tensorbord": "did you mean 'tensorboard'?",
    "train --output_dir docs --text_files python-stdlib": "output_dir 'docs' holds other files",
    "train --output_dir x --text_files README.md --max_length 999": "is above max_position_embeddings=256",
    "train --output_dir x --text_files README.md --model modern-xs --max_length 999": "max_position_embeddings=256",
    "train --output_dir x --text_files README.md --model nano-s --rope_theta 5": "needs position_embedding=rotary",
    "train --output_dir x --text_files README.md --num_key_value_heads 3": "num_key_value_heads, got 4 and 3",
    "train --output_dir x --text_files README.md --model modern-xs --head_dim 33": "head_dim must be even for rotary",
    "train --output_dir x --text_files README.md --model modern-xs --hidden_act gelu": "hidden_act=gelu needs mlp",
    "train --output_dir x --text_files README.md --position_embedding sinusoidal --n_embd 5 --n_head 5": "be even",
    "train --output_dir x --text_files README.md --dropout 1": "dropout must be at least 0 and below 1, got 1.0",
}


def answers(*lines: str) -> dict[str, tuple[str, str]]:
    """Return {command line: (exit code, message)}, each answered without a large library."""
    done = subprocess.run([sys.executable, "-c", _ANSWERS, *lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [line.split("|") for line in done.stdout.splitlines()]
    return {line: (code, message) for line, code, message in said}


def test_help_needs_no_large_library() -> None:
    lines = ["--help", *(f"{name} --help" for name in COMMANDS)]
    assert answers(*lines) == dict.fromkeys(lines, ("0", ""))


def test_a_refusal_is_one_line_and_needs_no_large_library() -> None:
    found = answers(*REFUSED)
    for line, message in REFUSED.items():
        code, said = found[line]
        assert (code, said[: len("error: ")]) == ("2", "error: "), line
        assert message in said


def test_a_folder_that_holds_a_run_is_refused_without_a_large_library(tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text("{}")
    line = f"train --output_dir {tmp_path} --text_files python-stdlib"
    message = f"error: output_dir '{tmp_path}' already holds a run: use resume, overwrite or another folder"
    assert answers(line) == {line: ("2", message)}


def test_the_version_is_that_of_the_package() -> None:
    command = [sys.executable, "-m", "gpt_kit_hf.commands.main", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown == f"gpt-kit {version('gpt-kit-hf')}\n"


def test_steps_that_a_run_does_not_have_are_refused_without_a_large_library(tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "eval", "step": 1}\n')
    line = f"verify {tmp_path} --replay 1:2"
    assert answers(line) == {line: ("2", "error: replay 1:2: the run has the steps 1 to 1")}


def test_the_known_trackers_are_those_of_accelerate() -> None:
    assert set(TRACKERS) == {"auto", "none", *LOGGER_TYPE_TO_CLASS}


def test_the_overview_names_every_command() -> None:
    command = [sys.executable, "-m", "gpt_kit_hf.commands.main"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f"  {each.name} " in shown and each.summary in shown for each in COMMANDS.values())
    nothing = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (nothing.returncode, nothing.stdout) == (2, shown)


def test_the_page_of_the_documentation_is_up_to_date() -> None:
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == options_page()


_KNOWN = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoModel
config = AutoConfig.for_model("gpt_kit", n_layer=1, n_head=2, n_embd=8, vocab_size=9)
assert type(config).__name__ == "GPTKitConfig"
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "GPTKitForCausalLM"
assert type(AutoModel.from_config(config)).__name__ == "GPTKitModel"
import sys
assert not any("gpt_kit_hf" in type(finder).__module__ for finder in sys.meta_path)
import gpt_kit_hf
assert gpt_kit_hf.GPTModel is gpt_kit_hf.GPTKitForCausalLM
"""
ORDERS = {
    "package first": "import gpt_kit_hf; assert 'transformers' not in sys.modules and 'torch' not in sys.modules",
    "transformers first": "import transformers; import gpt_kit_hf; assert 'torch' not in sys.modules",
    "configuration first": "from transformers import AutoConfig; import gpt_kit_hf",
    "models first": "from transformers import AutoModelForCausalLM; import gpt_kit_hf",
    "configuration after": "import gpt_kit_hf; from transformers import AutoConfig; AutoConfig.for_model('gpt_kit')",
    "layers after": "import gpt_kit_hf; import transformers.modeling_layers",
    "generation after": "import gpt_kit_hf; from transformers import GenerationMixin",
    "pipelines after": "import gpt_kit_hf; from transformers import pipeline",
    "our model after": "import gpt_kit_hf; gpt_kit_hf.GPTKitForCausalLM",
    "a module of ours first": "import gpt_kit_hf.model.modeling_gpt_kit",
    "our trainer first": "from gpt_kit_hf import train",
    "public name of the configuration": "from gpt_kit_hf import GPTKitConfig; GPTKitConfig()",
}


# Each is a process of its own; the others are for the slow tests.
FAST_ORDERS = ("package first", "models first", "our trainer first")


@pytest.mark.parametrize(
    "order", [order if order in FAST_ORDERS else pytest.param(order, marks=pytest.mark.slow) for order in ORDERS]
)
def test_importing_registers_the_model_in_any_order(order: str) -> None:
    code = f"import sys\n{ORDERS[order]}\n{_KNOWN}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Runs a script whose first import of a large library ends it.
_FIRST_LINE = """
import runpy, sys
class Loading:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "datasets", "numpy"):
            sys.stdout.flush()
            raise SystemExit(3)
sys.meta_path.insert(0, Loading())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("rank", "more", "line"),
    [
        ("0", [], "loading  PyTorch and transformers"),
        ("1", [], None),
        ("0", ["--log_format=json"], '{"event": "message", "time": "'),
    ],
)
@pytest.mark.parametrize("script", ["gpt_kit_hf/commands/main.py", "examples/pretrain.py"])
def test_the_first_line_comes_before_large_libraries_are_loaded(
    script: str, rank: str, more: list[str], line: str | None, tmp_path: Path
) -> None:
    command = ["train"] if script.endswith("main.py") else []
    given = [f"--output_dir={tmp_path / 'run'}", "--text_files=README.md", *more]
    ended = subprocess.run(
        [sys.executable, "-c", _FIRST_LINE, script, *command, *given],
        cwd=ROOT,
        env={**os.environ, "RANK": rank},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 3, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines == [] if line is None else [each.startswith(line) for each in lines] == [True]
