"""The notebook of the examples runs, its numbers are those of plain forward passes, and a student can change it."""

from __future__ import annotations

import ast
import copy
import json
import math
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FILE = Path(__file__).resolve().parents[2] / "examples" / "tour.ipynb"
IMAGE = "image/png"


class Kernel:
    """A Jupyter kernel in which warnings are errors, and the notebook that it runs."""

    def __init__(self, client: NotebookClient) -> None:
        self._client = client
        self.run("import warnings; warnings.simplefilter('error')")

    def run_cell(self, cell: Any) -> Any:
        """Run a cell and return it with its outputs; an error in it is raised here."""
        return self._client.execute_cell(cell, 0, store_history=False)

    def run(self, source: str) -> str:
        """Run source and return what it printed."""
        outputs = self.run_cell(nbformat.v4.new_code_cell(source)).outputs
        return "".join(each.text for each in outputs if each.output_type == "stream")

    def value(self, expression: str) -> Any:
        """Return the value of an expression of plain numbers, strings and lists."""
        return json.loads(self.run(f"import json; print(json.dumps({expression}))"))


def read() -> Any:
    return nbformat.read(FILE, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("jupyter")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(folder / name))
        client = NotebookClient(read(), timeout=300, resources={"metadata": {"path": str(folder)}})
        client.create_kernel_manager()
        with client.setup_kernel():
            yield Kernel(client)


@pytest.fixture(scope="module")
def executed(kernel: Kernel) -> dict[str, Any]:
    """The cells of the notebook by name, run in order."""
    return {cell.id: kernel.run_cell(cell) for cell in code_cells(read())}


def test_the_file_is_a_notebook_without_outputs() -> None:
    text = FILE.read_text(encoding="utf-8")
    notebook = json.loads(text)
    nbformat.validate(notebook)
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    titles = re.findall(r"^# .*$", "".join(line for cell in notebook["cells"] for line in cell["source"][:1]), re.M)
    assert len(titles) == 1


def test_only_public_names_are_used() -> None:
    import gpt_kit_hf

    modules: list[tuple[str, str]] = []
    for cell in code_cells(read()):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom):
                modules += [(str(node.module), each.name) for each in node.names]
            elif isinstance(node, ast.Import):
                modules += [(each.name, "") for each in node.names]
    kit = [(module, name) for module, name in modules if module.startswith("gpt_kit_hf")]
    assert kit
    assert all(module == "gpt_kit_hf" and name in gpt_kit_hf.__all__ for module, name in kit)
    others = {module.split(".")[0] for module, _ in modules} - {"gpt_kit_hf"}
    assert others - sys.stdlib_module_names == {"torch", "matplotlib"}


def test_every_cell_is_explained_and_can_be_changed() -> None:
    notebook = read()
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code" and cell.id != "imports":
            assert before.cell_type == "markdown"
            assert "**Try:**" in before.source
            assert suggestions(before.source)


def test_the_model_learns(kernel: Kernel, executed: dict[str, Any]) -> None:
    losses = kernel.value("losses")
    assert len(losses) == 200
    assert losses[0] == pytest.approx(math.log(512), abs=0.15)
    # The frequencies of single tokens alone give 5.2.
    assert kernel.value("held_out_loss") < 4.5
    assert executed["loss"].outputs[0].text.startswith("the loss of a batch: 6.")


def test_bits_per_byte_are_those_of_the_windows(kernel: Kernel, executed: dict[str, Any]) -> None:
    bits = kernel.value("model_bits")
    # The bits of all targets over the bytes of their tokens, in the loader's order.
    by_hand = kernel.run("""
with torch.no_grad():
    sums = [
        torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        for x, y in held_out_loader
    ]
n_bytes = sum(len(tokenizer.decode_bytes(y.flatten().tolist())) for _, y in held_out_loader)
print(sum(sums) / math.log(2) / n_bytes)
""")
    assert bits == pytest.approx(float(by_hand), rel=0.01)
    assert 1 < bits < 3
    assert 1 < kernel.value("gzip_bits") < 4


def test_probabilities_are_those_of_a_forward_pass(kernel: Kernel, executed: dict[str, Any]) -> None:
    kernel.run("probe_ids = text_to_token_ids(probe, tokenizer)")
    found = kernel.value("probability.tolist()")
    plain = kernel.value(
        "[model(probe_ids[:, :n]).logits[0, -1].softmax(-1)[probe_ids[0, n]].item()"
        " for n in range(1, probe_ids.shape[1])]"
    )
    assert found == pytest.approx(plain, rel=1e-3, abs=1e-6)
    assert max(found) > 0.2


def test_pictures_are_shown(executed: dict[str, Any]) -> None:
    with_pictures = {
        name for name, cell in executed.items() if any(IMAGE in each.get("data", {}) for each in cell.outputs)
    }
    assert with_pictures == {"bytes", "probabilities", "sampling", "attention", "lens"}
    # Nothing on the error stream, such as a warning of a logger. Imports of other packages may write there.
    written = {name for name, cell in executed.items() if any(each.get("name") == "stderr" for each in cell.outputs)}
    assert written <= {"imports"}


def suggestions(explanation: str) -> dict[str, str]:
    """Return the assignments that a cell's explanation suggests to try, by name."""
    tried = explanation.partition("**Try:**")[2]
    return {name: line for line, name in re.findall(r"`((\w+) = [^`]+)`", tried) if name != "text"}


def changed(cell: Any, lines: dict[str, str]) -> Any:
    """Return the cell with the last assignment of each name replaced by another line; each must have one."""
    cell = copy.deepcopy(cell)
    for name, line in lines.items():
        assigned = list(re.finditer(rf"^{name} = .*$", cell.source, re.M))
        assert assigned, name
        cell.source = cell.source[: assigned[-1].start()] + line + cell.source[assigned[-1].end() :]
    return cell


def text_of_random_words() -> str:
    draw = random.Random(0)
    words = ["".join(draw.choices("aeiouäéklmnrst$", k=draw.randint(1, 7))) for _ in range(300)]
    return " ".join(draw.choices(words, weights=range(300, 0, -1), k=20_000))


def test_what_is_suggested_works(kernel: Kernel, executed: dict[str, Any]) -> None:
    """All suggested changes at once, on a text of one's own, with fewer steps."""
    notebook = read()
    lines = {name: line for cell in notebook.cells for name, line in suggestions(cell.source).items()}
    assert {"width", "n_layers", "vocab_size", "temperature"} <= lines.keys()
    lines |= {"n_steps": "n_steps = 3", "text": f"text = {text_of_random_words()!r}"}
    for cell in code_cells(notebook):
        if cell.id != "imports":
            names = set(re.findall(r"^(\w+) = ", cell.source, re.M)) & lines.keys()
            kernel.run_cell(changed(cell, {name: lines.pop(name) for name in names}))
    assert lines == {}
    assert kernel.value("model.config.hidden_size") == 64
    assert kernel.value("len(losses)") == 3
    assert kernel.value("tokenizer.n_vocab") == 400
    assert kernel.value("list(weights.shape[:2])") == [2, 2]
