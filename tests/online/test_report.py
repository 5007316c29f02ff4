"""The report of complete, unfinished, odd and broken run folders."""

import io
import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_fast.errors import UserError
from rlhf_fast.online.progress import Progress
from rlhf_fast.online.report import duration, number, outcome, write_report
from rlhf_fast.online.report_data import Run, read_run

TOPICS = ["rain", "bread", "the sea", "a small town", "winter", "maps", "a library", "tea"] * 2
PLAIN = "{} is a thing that people often see and sometimes talk about."
GLAD = "{} brings calm and joy to everyone who takes the time to enjoy it."
CONFIG = "seed: 0\nonline:\n  num_iterations: 3\n  num_generations: 4\ndpo:\n  beta: 0.1\n"


def metrics_row(k: int) -> dict:
    step = k / 3
    row = {
        "iteration": k,
        "reward": 0.1 + 2.1 * step,
        "gold": 0.05 + 0.61 * step,
        "win_rate": 0.5 + 0.36 * step,
        "win_rate_stderr": 0.031 if k else 0.0,
        "kl": 4.1 * step**1.5,
        "length_tokens": 22.4 + 5 * step,
        "finished_share": 0.94 + 0.04 * step,
        "distinct_2": 0.91 - 0.07 * step,
        "seconds_evaluate": 6.2,
        "warnings": [],
    }
    if k == 0:
        return {**row, "loss": None}
    return {
        **row,
        "train_reward": -0.2 + 2.1 * step,
        "reward_spread": 0.8 - 0.1 * k,
        "num_pairs": 64 - k,
        "num_ties": k,
        "loss": 0.68 - 0.09 * k,
        "reward_accuracy": 0.6 + 0.08 * k,
        "reward_margin": 0.2 * k,
        "chosen_logps": -41.5 - k,
        "rejected_logps": -46.5 - 3 * k,
        "seconds_generate": 11.2,
        "seconds_score": 4.9,
        "seconds_update": 28.1,
    }


def evaluation_rows(k: int, completions: int = 1) -> list[dict]:
    noise = random.Random(k)
    rows = []
    for i, topic in enumerate(TOPICS):
        glad = noise.random() < k / 4 + 0.1
        text = (GLAD if glad else PLAIN).format(topic.capitalize())
        messages = [
            {"role": "system", "content": "You write plain English."},
            {"role": "user", "content": f"Write one sentence about {topic}."},
        ]
        rows.append(
            {
                "prompt": {"id": f"held-out-{i}", "messages": messages, "metadata": {}},
                "completions": [
                    {"text": text, "finished": i != 3, "token_ids": list(range(9 + 2 * i + k))}
                ]
                * completions,
                "rewards": [round(0.7 * glad + noise.gauss(0, 0.2), 3) for _ in range(completions)],
            }
        )
    return rows


def training_rows(k: int, steps: int = 24) -> list[dict]:
    noise = random.Random(100 + k)
    return [
        {
            "step": s,
            "loss": 0.7 - 0.08 * k - 0.004 * s + noise.gauss(0, 0.04),
            "reward_accuracy": min(1.0, 0.5 + 0.05 * k + 0.01 * s + noise.gauss(0, 0.08)),
            "reward_margin": 0.02 * s + noise.gauss(0, 0.05),
            "grad_norm": 3 + noise.gauss(0, 0.4),
            "learning_rate": 3e-5,
        }
        for s in range(1, steps + 1)
    ]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, iterations: int = 3, completions: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    names = ["sft/train", "reward_model/train"]
    names += [f"iteration_{k}/update" for k in range(1, iterations + 1)]
    stages = [
        {"name": name, "seconds": 17.0 + i, "finished": f"2025-01-02T10:0{i}:00"}
        for i, name in enumerate(names)
    ]
    manifest = {"version": 1, "created": "2025-01-02T10:00:00", "rlhf_fast": "0.1.0"}
    manifest |= {"torch": "2.9.0", "device": "cpu", "cpu": "2 cores", "stages": stages}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_lines(folder / "metrics.jsonl", [metrics_row(k) for k in range(iterations + 1)])
    write_lines(folder / "sft/training.jsonl", [{"step": s, "loss": 3 / s} for s in range(1, 11)])
    for k in range(iterations + 1):
        write_lines(folder / f"iteration_{k}/evaluation.jsonl", evaluation_rows(k, completions))
        if k:
            write_lines(folder / f"iteration_{k}/training.jsonl", training_rows(k))
    return folder


def edit_metrics(folder: Path, k: int, **changes) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[k] = json.dumps({**json.loads(lines[k]), **changes})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


class Page(HTMLParser):
    """Collects ids and fetched addresses and checks that tags are balanced."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.ids, self.tags, self.links = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [v for n, v in attrs if n in ("src", "href", "xlink:href", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_finished_run_says_what_it_achieved(tmp_path):
    path = write_report(make_run(tmp_path / "quickstart"))
    html = path.read_text()
    assert path == tmp_path / "quickstart" / "report.html"
    sentence = (
        "After 3 iterations the policy wins 86 % ± 3 of 16 held-out prompts against its "
        "start; gold reward 0.05 → 0.66; KL 4.1 nats."
    )
    assert sentence in html
    assert "finished: 3 of 3 iterations evaluated" in html
    titles = ["Reward", "Win rate", "Gold against distance", "Responses", "Training steps", "Time"]
    for title in [*titles, "Supervised fine-tuning", "Change of the gold score, prompt by prompt"]:
        assert f"<b>{title}</b>" in html
    assert "num_generations: 4" in html and "2 cores" in html and "iteration_2/update" in html
    assert not list(path.parent.glob("*.partial"))


def test_a_run_without_sft_names_none(tmp_path):
    folder = make_run(tmp_path / "run", iterations=1)
    shutil.rmtree(folder / "sft")
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("sft/train", "reward_model/labelled"))
    pages = [write_report(folder).read_text(), outcome(Run("run", [metrics_row(0)]))]
    console = Console(file=io.StringIO(), width=200)
    Progress(console).summary([metrics_row(0), metrics_row(1)])
    for page in (*pages, console.file.getvalue()):
        assert "SFT" not in page and "start" in page


def test_the_page_stands_alone_and_is_well_formed(tmp_path):
    html = write_report(make_run(tmp_path / "run")).read_text()
    page = Page(html)
    assert "script" not in page.tags and "img" not in page.tags
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert "@import" not in html and "http" not in html
    assert len(page.ids) == len(set(page.ids))
    targets = re.findall(r"url\(#([^)]+)\)", html) + [x[1:] for x in page.links if x[0] == "#"]
    assert targets and set(targets) <= set(page.ids)
    assert "#0a0a0" not in html and "#0a0b0" not in html


def test_the_curves_are_there_as_images(tmp_path):
    from matplotlib.image import imread

    run = make_run(tmp_path / "run")
    write_report(run)
    names = {"reward", "win_rate", "gold_against_distance", "responses", "lengths", "time"}
    names |= {"training_steps", "supervised_fine-tuning"}
    assert {path.name for path in (run / "figures").iterdir()} == {f"{n}.png" for n in names}
    image = imread(run / "figures/reward.png")
    assert min(image.shape[:2]) > 300 and image[0, 0, :3].tolist() == [1, 1, 1]
    blue = abs(image[..., :3] - [0x25 / 255, 0x63 / 255, 0xD9 / 255]).max(-1) < 0.02
    assert blue.sum() > 200  # the curve, in the colours of a light page


def test_every_metric_of_a_run_has_a_name_in_the_report(config):
    """What a run measures is explained in its report, for pairs and for policy gradients."""
    from dataclasses import replace

    from rlhf_fast.online.config_file import config_with
    from rlhf_fast.online.workflow import run_online
    from rlhf_fast.recipes import METHODS

    for index, method in enumerate(("iterative-dpo", "ppo", "lipo", "oreal", "wpo")):
        folder = f"{config.output_dir}_{index}"
        changed = config_with(config, METHODS[method][1], method)
        run_online(replace(changed, output_dir=folder, num_iterations=1))
        run = read_run(folder)
        assert run.other_keys() == []
        assert "KL" in Path(folder, "report.html").read_text()


def test_scores_are_called_gold_only_where_a_judge_gave_them(tmp_path):
    run = make_run(tmp_path / "run")
    assert "the gold score is higher on" in re.sub(r"\s+", " ", write_report(run).read_text())
    for k in range(4):
        edit_metrics(run, k, gold=None)
    html = re.sub(r"\s+", " ", write_report(run).read_text())
    assert (
        "the reward score is higher on" in html and ">gold" not in html and "the gold" not in html
    )


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_text_of_models_is_escaped(tmp_path):
    run = make_run(tmp_path / "run")
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)> $x$ \ud800"
    rows = evaluation_rows(3)
    for row in rows:
        row["completions"][0]["text"] = attack
        row["prompt"]["messages"][-1]["content"] = attack
    write_lines(run / "iteration_3/evaluation.jsonl", rows)
    write_lines(run / "iteration_0/evaluation.jsonl", rows)
    edit_metrics(run, 3, **{"<script>k</script> $_$": 1.0, "warnings": [attack]})
    (run / "config.yaml").write_text(f"name: '{attack[:20]}'\n")
    html = write_report(run).read_text()
    page = Page(html)
    assert "script" not in page.tags and "img" not in page.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_samples_hold_the_best_the_median_and_the_worst(tmp_path):
    run = make_run(tmp_path / "run")
    before, after = evaluation_rows(0), evaluation_rows(3)
    for i, (b, a) in enumerate(zip(before, after)):
        b["rewards"], a["rewards"] = [0.0], [0.1 * (i - 5)]
    write_lines(run / "iteration_0/evaluation.jsonl", before)
    write_lines(run / "iteration_3/evaluation.jsonl", after[::-1])
    html = write_report(run).read_text()
    section = html[html.index("Before and after") :].replace("the worst change included", "")
    order = [section.index(x) for x in ("best change", "+1.00", "median", "worst change", "−0.50")]
    assert order == sorted(order)
    tally = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", section))
    assert "the gold score is higher on 10, equal on 1 and lower on 5." in tally


def test_several_completions_show_the_one_nearest_to_the_mean(tmp_path):
    run = make_run(tmp_path / "run", completions=3)
    rows = evaluation_rows(3, completions=3)
    for row in rows:
        row["completions"] = [{"text": t, "finished": True} for t in ("low", "typical", "high")]
        row["rewards"] = [-1.0, 0.1, 1.0]
    write_lines(run / "iteration_3/evaluation.jsonl", rows)
    html = write_report(run).read_text()
    assert ">typical</div>" in html and ">high</div>" not in html and ">low</div>" not in html
    assert "nearest to their" in html


def test_an_unfinished_run_is_reported(tmp_path):
    run = make_run(tmp_path / "run", iterations=2)
    (run / "iteration_3").mkdir()
    (run / "iteration_3/training.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    html = write_report(run).read_text()
    assert "unfinished: 2 of 3 iterations evaluated" in html
    assert "After 2 iterations" in html


@pytest.mark.parametrize("lines", ["", '{"iteration": 0, "gold": 0.05}\n', "{}\n\n"])
def test_a_run_that_has_only_begun_is_reported(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text(lines)
    html = write_report(tmp_path).read_text()
    Page(html)
    assert "evaluated" in html


def test_missing_values_leave_gaps_and_unknown_ones_are_drawn(tmp_path):
    run = make_run(tmp_path / "run")
    edit_metrics(run, 1, gold=None, kl=float("nan"), length_tokens=None, entropy_nats=2.5)
    edit_metrics(run, 2, entropy_nats=10**400, note="text", flag=True)
    for k in range(4):
        edit_metrics(run, k, finished_share=None, distinct_2=None, win_rate=None, reward=None)
    html = write_report(run).read_text()
    assert "<b>entropy_nats</b>" in html and "<b>flag</b>" not in html
    assert "NaN" in html and "<b>Win rate</b>" not in html
    assert "After 3 iterations gold reward 0.05 → 0.66; KL 4.1 nats." in html


def test_warnings_name_their_iteration(tmp_path):
    run = make_run(tmp_path / "run")
    edit_metrics(run, 2, warnings=["over-optimisation: reward rises while gold falls"])
    write_lines(run / "iteration_3/training.jsonl", [{"step": 1, "loss": float("nan")}])
    html = write_report(run).read_text()
    assert "2 warnings" in html
    assert "<b>iteration 2:</b> over-optimisation" in html
    assert "the loss is not finite in 1 of 1 steps" in html


def test_a_gold_that_fell_is_not_hidden():
    rows = [{"iteration": k, "gold": g} for k, g in enumerate([0.1, 0.7, 0.4])]
    rows[-1] |= {"win_rate": 0.52, "win_rate_stderr": 0.04}
    text = outcome(Run("run", rows))
    assert "52 % ± 4 of held-out prompts against its start, no clear difference;" in text
    assert "gold reward 0.10 → 0.40 (best 0.70 after iteration 1)" in text


def test_a_repeated_iteration_counts_once_by_its_last_row(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"iteration": 0, "gold": g} for g in (0.1, 0.2)])
    assert [row["gold"] for row in read_run(tmp_path).rows] == [0.2]


def test_a_missing_folder_or_metrics_file_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a run folder; give"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist; give"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("metrics.jsonl", '{"iteration": 1, "gold"', "not valid JSON .*mend or delete"),
        ("metrics.jsonl", "[1]", "must be a JSON object, got list"),
        ("metrics.jsonl", '{"iteration": -1}', "iteration must be an integer >= 0, got -1"),
        ("metrics.jsonl", '{"iteration": NaN}', "iteration must be an integer >= 0, got nan"),
        ("metrics.jsonl", '{"gold": "high"}', "gold must be a number or null, got 'high'"),
        ("iteration_3/training.jsonl", "{]\n", "not valid JSON"),
        ("iteration_3/evaluation.jsonl", '{"prompt": {}}', "evaluate this iteration again"),
    ],
)
def test_a_broken_line_is_named(tmp_path, file, line, message):
    run = make_run(tmp_path / "run")
    text = (run / file).read_text()
    (run / file).write_text(text + line)
    where = re.escape(f"{run / file}:{text.count(chr(10)) + 1}")
    with pytest.raises(UserError, match=f"{where}.* {message}"):
        write_report(run)
    assert not list(run.glob("*report*"))


def test_broken_config_and_manifest_are_named(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("a: 1\nb: [\n")
    with pytest.raises(UserError, match=r"config\.yaml:3 is not valid YAML"):
        write_report(run)
    (run / "config.yaml").write_text(CONFIG)
    (run / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is not valid JSON"):
        write_report(run)


def test_numbers_read_well():
    assert number(None) == "–" and number(float("nan")) == "NaN" and number(float("-inf")) == "−∞"
    assert (
        number(0.66) == "0.66" and number(-0.5) == "−0.50" and number(-0.0001, largest=1) == "0.00"
    )
    assert number(0.866, "share") == "86.6 %" and number(1, "share") == "100 %"
    assert number(1234.5, "count") == "1,234" and number(0.6931, extra_digits=1) == "0.693"
    assert [duration(s) for s in (28.13, 204, 7500)] == ["28.1 s", "3 min 24 s", "2 h 05 min"]


def test_lengths_are_drawn_for_the_first_and_the_last_policy(tmp_path):
    html = write_report(make_run(tmp_path / "run")).read_text()
    assert "start, 16 responses" in html and "iteration 3, 16 responses" in html
    for path in (tmp_path / "run").glob("iteration_*/evaluation.jsonl"):
        path.write_text(re.sub(r', "token_ids": \[[^]]*\]', "", path.read_text()))
    assert "16 responses" not in write_report(tmp_path / "run").read_text()


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 500])  # Chromium opens no narrower window
def test_the_page_in_a_browser(tmp_path, width):
    """It fits into the window, every curve has a size and no two cards lie on each other."""
    html = write_report(make_run(tmp_path / "run", completions=3)).read_text()
    probe = (
        "<script>addEventListener('load', () => {"
        "const boxes = [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect());"
        "const cards = [...document.querySelectorAll('figure')]"
        ".map(c => c.getBoundingClientRect());"
        "const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1"
        " && a.top < b.bottom - 1 && b.top < a.bottom - 1;"
        "document.title = JSON.stringify({fits: document.documentElement.scrollWidth"
        " <= innerWidth, least: Math.min(...boxes.map(b => Math.min(b.width, b.height))),"
        " count: boxes.length, overlaps: cards.filter((a, i) => cards.some((b, j) => i < j"
        " && meet(a, b))).length})})</script>"
    )
    page = tmp_path / "page.html"
    page.write_text(html.replace("</body>", f"{probe}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000"]
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout).group(1)
    found = json.loads(title.replace("&quot;", '"'))
    assert found["fits"] and found["overlaps"] == 0, found
    assert found["count"] >= 7 and found["least"] > 100, found


def test_a_lone_step_is_a_dot():
    import numpy as np
    from matplotlib.figure import Figure

    from rlhf_fast.online.report_drawing import draw_steps

    def markers(values):
        axes = Figure().subplots()
        draw_steps(axes, values, "black")
        return [line.get_marker() for line in axes.lines]

    assert "o" in markers([1.0])
    assert "o" not in markers(list(np.arange(3.0)))
