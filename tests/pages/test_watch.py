"""The page of `gpt-kit watch`: what it answers, while runs begin, grow, are resumed and go."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from run_folders import metric_lines, write_lines, write_run
from starlette.testclient import TestClient

from gpt_kit_hf.pages import watch
from gpt_kit_hf.pages.watch import watch_app
from gpt_kit_hf.storage.atomic_files import cut_jsonl
from gpt_kit_hf.storage.lock import RunLock
from gpt_kit_hf.text import display_names


class Page:
    """A page: what it was told last, and the answers to what it asks."""

    def __init__(self, *places: Path) -> None:
        self._client = TestClient(watch_app(places), base_url="http://127.0.0.1")

    def ask(self, **runs: dict[str, Any]) -> dict[str, Any]:
        answer = self._client.post("/update", json={"runs": runs})
        assert answer.status_code == 200, answer.text
        content: dict[str, Any] = answer.json()
        return content

    def show(self, number: int = 0, **seen: Any) -> dict[str, Any]:
        run: dict[str, Any] = self.ask(**{str(number): seen})["runs"][number]
        return run


@pytest.fixture(autouse=True)
def _always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_LOOK_AGAIN", -1.0)


def all_files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (folder, *folder.rglob("*"))
    }


def test_curves_facts_samples_and_options(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 40, planned=80, options={"training.seed": 7})
    before = all_files(folder)
    run = Page(folder).show()
    assert all_files(folder) == before  # nothing is written
    lines = metric_lines(40)
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert run["curves"]["train"]["series"]["loss"]["value"] == pytest.approx(losses, rel=1e-6)
    assert run["curves"]["train"]["steps"] == list(range(1, 41))
    scores = [line["bits_per_byte"] for line in lines if line["kind"] == "eval"]
    assert run["curves"]["eval"]["series"]["bits_per_byte"]["value"] == pytest.approx(scores, rel=1e-6)
    assert (run["name"], run["state"]) == ("run", "interrupted")
    facts = run["facts"]
    assert (facts["step"], facts["planned"], facts["trained_tokens"]) == (40, 80, 40 * 512)
    assert (facts["best"]["step"], facts["left"]) == (40, None)
    assert facts["last"]["memory_bytes"] == 10**8 + 40
    assert run["about"]["options"]["training.seed"] == 7
    assert [sample["step"] for sample in run["samples"]["new"]] == [10, 20, 30, 40]
    with RunLock(folder):
        facts = Page(folder).show()["facts"]
    assert facts["left"] == pytest.approx(40 * 512 / 1040)


def test_only_what_is_new_is_sent(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 40, planned=80)
    page = Page(folder)
    first = page.show()
    seen = {"version": first["version"], "about": first["about"]["digest"], "train": 40, "eval": 4, "speed": 4}
    again = page.show(**seen, samples=4)
    assert again["about"] == {"digest": first["about"]["digest"]}
    assert again["samples"] == {"from": 4, "new": []}
    assert again["curves"]["train"]["steps"] == [40]  # the last row may have grown
    write_lines(folder, metric_lines(50, first=41))
    later = page.show(**seen, samples=4)
    assert later["curves"]["train"]["from"] == 39
    assert later["curves"]["train"]["steps"] == list(range(40, 51))
    assert [sample["step"] for sample in later["samples"]["new"]] == [50]
    assert "curves" not in page.ask()["runs"][0]  # it is not shown


def test_a_resumed_run_is_sent_anew(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 40, planned=80)
    page = Page(folder)
    first = page.show()
    cut_jsonl(folder / "metrics.jsonl", lambda line: line["step"] <= 20)
    again = page.show(version=first["version"], train=40, eval=4, speed=4, samples=4)
    assert again["version"] != first["version"]
    assert (again["curves"]["train"]["from"], again["samples"]["from"]) == (0, 0)
    assert again["curves"]["train"]["steps"] == list(range(1, 21))
    # A page that was left open when the program was started again has another version, too.
    assert Page(folder).show(version=again["version"], train=20)["curves"]["train"]["from"] == 0


def test_a_run_that_begins_later_and_one_that_goes(tmp_path: Path) -> None:
    page = Page(tmp_path / "later", tmp_path / "group")
    found = page.ask()
    assert (found["runs"], found["waiting"]) == ([], [str(tmp_path / "later"), str(tmp_path / "group")])
    write_run(tmp_path / "later", 10, planned=20, checkpoints=())
    assert page.show()["facts"]["step"] == 10
    write_run(tmp_path / "group" / "a", 5, checkpoints=())
    found = page.ask()
    assert ([run["name"] for run in found["runs"]], found["waiting"]) == (["later", "a"], [])
    assert found["runs"][1]["state"] == "finished"
    shutil.rmtree(tmp_path / "later")
    assert page.show()["state"] == "missing"


def test_a_run_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, 10, checkpoints=())
    (tmp_path / "a" / "metrics.jsonl").unlink()
    (tmp_path / "a" / "metrics.jsonl").symlink_to(tmp_path / "b" / "metrics.jsonl")
    found = Page(tmp_path).ask(**{"0": {}, "1": {}})["runs"]
    assert (found[0]["state"], "curves" in found[0]) == ("unreadable", False)
    assert "symbolic link" in found[0]["error"]
    assert found[1]["facts"]["step"] == 10


@pytest.mark.parametrize("number", ["../b", "/etc/passwd", "1", "-1", "0x0"])
def test_no_request_names_a_run_outside(tmp_path: Path, number: str) -> None:
    write_run(tmp_path / "a", 10, checkpoints=())
    write_run(tmp_path / "b", 20, checkpoints=())
    found = Page(tmp_path / "a").ask(**{number: {}})
    assert [set(run) for run in found["runs"]] == [{"id", "name", "state"}]


def test_no_path_reads_a_file_of_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", 10, checkpoints=())
    (folder / "secret.txt").write_text("hidden words")
    client = TestClient(watch_app([folder]), base_url="http://127.0.0.1")
    for path in ("/secret.txt", "/a/secret.txt", "/run.json", f"{folder}/secret.txt", "/%2e%2e/secret.txt"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert "hidden words" not in answer.text
    assert "hidden words" not in json.dumps(Page(folder).show())
    assert TestClient(watch_app([folder]), base_url="http://evil.example").get("/").status_code == 400
    assert client.post("/update", json={"runs": {}}, headers={"Origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize("body", [{}, {"runs": []}, {"runs": {"0": {"train": -1}}}, {"runs": {"0": {"path": "/"}}}])
def test_a_request_that_the_page_does_not_make(tmp_path: Path, body: dict[str, Any]) -> None:
    client = TestClient(watch_app([tmp_path]), base_url="http://127.0.0.1")
    assert client.post("/update", json=body).status_code == 400


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "x" / "a", tmp_path / "y" / "a", tmp_path / "y" / "b"]
    assert display_names(folders) == dict(zip(folders, ["x/a", "y/a", "b"], strict=True))


def test_the_command_serves_without_torch_and_stops_on_request(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 10, checkpoints=())
    program = (
        "import sys; from gpt_kit_hf.commands.main import main; "
        "code = main(sys.argv[1:]); sys.exit(9 if 'torch' in sys.modules else code)"
    )
    (tmp_path / "empty").mkdir()
    places = [str(tmp_path / name) for name in ("run", "nope", "empty")]
    command = [sys.executable, "-c", program, "watch", *places]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"waiting for {places[1]}\n"
            assert process.stdout.readline() == f"waiting for a run in {places[2]}\n"
            url = process.stdout.readline().split()[2]
            assert url.startswith("http://127.0.0.1:")
            body = json.dumps({"runs": {"0": {}}}).encode()
            request = urllib.request.Request(f"{url}update", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["runs"][0]["facts"]["step"] == 10
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()
