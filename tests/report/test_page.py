"""report.html in a real browser: it renders, filters, fetches nothing, and shows what a model wrote as text."""

import json
import re
import shutil
from html import escape
from time import process_time

import pytest

from src.evaluation.results import make_results
from src.evaluation.results_schema import ARMS
from src.evaluation.verdict import could_show_nothing
from src.report.page import TEMPLATE, browser_data, script_json, write_reports
from src.report.plots import Dot, Point, Series, Tick, dots, lines, ticks
from src.report.tables import markdown

NASTY = {
    "maths-000": "<script>document.title = 'owned'</script></script><img src=x onerror=\"document.title='owned'\">",
    "maths-001": "a \"double\" and 'single' quote, `tick`, &amp; &lt;b&gt; @@HASH@@ <!-- --> ]]> \\u003c",
    "maths-002": "\u202eשלום עולם 123\u202c and مرحبا",
    "maths-003": "🎉 fine 👩‍👩‍👧 你好\u2028next\u2029end\u0000",
}


@pytest.fixture(scope="module")
def evaluation(made_up):
    """A small evaluation; some of the distilled student's answers, a prompt and a path are hostile."""
    samples = made_up["samples"](14, temperatures=(0.1, 0.7))
    for row in samples:
        if row["arm"] == "kd" and row["id"] in NASTY:
            row["response"] = NASTY[row["id"]]
        if row["id"] == "maths-000":
            row["prompt"], row["reference"] = f"{row['prompt']} {NASTY['maths-000']}", "</script>"
    settings = made_up["context"](mode="<b>full</b>")
    settings["arms"]["kd"] = "outputs/<img src=x onerror=alert(1)>"
    return make_results(samples, made_up["heldout"](), settings, 42), samples


@pytest.fixture(scope="module")
def page(evaluation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_reports(folder, *evaluation)
    return folder / "report.html"


def test_the_page_is_whole_and_fetches_nothing(page):
    text = page.read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(data)["items"]
    rest = text.replace(data, "")
    assert "lower bound" not in rest
    assert not re.search(r"<[^>]*\b(?:src|href|style|on\w+)\s*=|url\(|@import|https?:", rest)
    assert "@@" not in rest
    assert "default-src 'none'" in rest
    assert rest.count("<script") == 2
    assert "<img" not in rest
    assert "&lt;b&gt;full&lt;/b&gt;" in rest


def test_bounds_are_called_bounds(made_up, tmp_path):
    """Of the held-out text, and of the curves over the validation rows."""
    held = [row | {"kl_is": "lower bound over the top 8 and the rest"} for row in made_up["heldout"]()]
    settings = made_up["context"]()
    settings["training"]["kd"]["kl_is"] = held[0]["kl_is"]
    results = make_results(made_up["samples"](4, temperatures=(0.1,)), held, settings, 42)
    write_reports(tmp_path, results, [])
    note = "Every KL to the teacher is a lower bound over the top 8 and the rest"
    assert note in markdown(results)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in (note, "prompts (lower bounds)", "The KL on validation rows is a lower bound over the top 8"):
        assert words in text


def test_data_cannot_leave_its_block():
    value = [*NASTY.values(), "</SCRIPT>", "<!--<script>"]
    text = script_json(value)
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == value


def test_too_many_answers_are_cut_and_counted(evaluation, monkeypatch):
    from src.report import page

    whole = browser_data(evaluation[1])
    assert len(whole["items"]) == whole["all"] == 14 * 2 * 2
    monkeypatch.setattr(page, "MAX_EMBEDDED", 3000)
    few = browser_data(evaluation[1])
    assert 0 < len(few["items"]) < few["all"] == whole["all"]


def test_reports_are_rendered_from_the_stored_files_alone(evaluation, page, tmp_path):
    results, samples = json.loads(json.dumps(evaluation))
    write_reports(tmp_path, results, samples)
    for name in ("report.html", "report.md"):
        assert (tmp_path / name).read_bytes() == page.with_name(name).read_bytes()


def test_markdown_has_the_verdict_the_decisions_and_no_model_text(evaluation):
    results, samples = evaluation
    text = markdown(results)
    assert results["headline"] in text
    for c in results["graded"]["comparisons"]:
        row = f"| {c['won']} / {c['lost']} | {c['p']:.2g} | {c['p_holm']:.2g} |"
        assert row in text or not c["could_differ"]
    assert not [row for row in samples if row["response"] in text]


def test_a_domain_cannot_break_a_table_of_the_markdown(made_up):
    samples = made_up["samples"](3, domains=("a|b\nc",))
    text = markdown(make_results(samples, [], made_up["context"](), 0))
    rows = [line for line in text.splitlines() if line.startswith("| a\\|b c |")]
    assert len(rows) == 3
    assert all(row.replace("\\|", "").count("|") == 11 for row in rows)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 0.02), (0.0, 0.0), (5, 5), (2.1, 947), (-1e-6, 3e-6)])
def test_ticks_enclose_and_are_few(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12
    assert 2 <= len(found) <= 7


def test_plots_place_values_and_escape_names():
    plot = dots([Dot("<b>"), Dot("a&b", "kd", 0.5, [0.25, 1.0], True), Dot("x", "sft", instead="none")], str, "<i>")
    assert "&lt;b&gt;" in plot
    assert "a&amp;b: 0.5 [0.25, 1.0]" in plot
    assert 'class="mark hollow"' in plot
    [(x1, x2)] = re.findall(r'class="whisker" x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', plot)
    [x] = re.findall(r'polygon class="mark hollow" transform="translate\(([\d.]+)', plot)
    assert (float(x) - float(x1)) / (float(x2) - float(x1)) == pytest.approx(1 / 3, abs=0.01)
    series = [Series("kd", "kd", [Point(0, 0.0), Point(10, 1.0)])]
    rising = lines(series, str, "", [Tick(0, "0"), Tick(10, "10")], "x", marks=False)
    (xa, ya), (xb, yb) = re.findall(r"([\d.]+) ([\d.]+)", re.search(r' d="M([^"]+)"', rising)[1].replace("L", ";"))
    assert float(xa) < float(xb)
    assert float(ya) > float(yb), "SVG's y points down"


@pytest.fixture(scope="module")
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (requirements-dev.txt)")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def opened(browser, page):
    """The page at a desktop's size; nothing may have been said on the console when a test ends."""
    browser.set_window_size(1280, 900)
    browser.get_log("browser")
    browser.get(page.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    assert browser.title == "Evaluation of made_up"


def texts(browser, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(node => node.textContent)"
    return browser.execute_script(script, selector)


def choose(browser, control: str, value: str | bool) -> list[str]:
    """Set a control as a person would; returns the count line's numbers: matching, all, shown."""
    browser.execute_script(
        """const node = document.getElementById(arguments[0]);
        if (node.type === "checkbox") node.checked = arguments[1]; else node.value = arguments[1];
        node.dispatchEvent(new Event("input", {bubbles: true}));""",
        control, value,
    )  # fmt: skip
    return [int(number) for number in re.findall(r"\d+", texts(browser, "#count")[0])]


def test_it_renders(opened, evaluation):
    results, _ = evaluation
    assert texts(opened, "h1") == [results["headline"]]
    assert len(texts(opened, "svg.plot")) == 22
    titles = ["Closeness to the teacher", "Correct answers", "Differences, paired by prompt", "Training"]
    assert set(titles) <= set(texts(opened, "h2"))
    assert len(texts(opened, ".item")) == 20
    compared = [*results["graded"]["overall"]["comparisons"], *results["graded"]["comparisons"]]
    shown = [c for c in compared if c["decision"] == "not shown" and c["could_differ"]]
    assert texts(opened, "td").count("no difference shown") == len(shown) > 0
    assert texts(opened, ".note").count(could_show_nothing(compared)) == 1
    closeness_said, control_said = texts(opened, ".standfirst")
    assert closeness_said.startswith("Of 100 tokens of the distilled student its teacher would accept")
    assert control_said.startswith("Distilled against SFT: ")


def test_the_first_screen_holds_the_sentences_and_the_picture(opened, page):
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False},
    )
    opened.get(page.as_uri())
    bottom = "return document.querySelector(arguments[0]).getBoundingClientRect().bottom"
    assert 0 < opened.execute_script(bottom, "h1") < opened.execute_script(bottom, ".picture") < 800
    titles = ["Together", "maths", "ops", "Held-out text"]
    assert texts(opened, ".picture figcaption b") == titles
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_what_a_model_wrote_is_text(opened):
    for row_id, said in NASTY.items():
        choose(opened, "search", row_id)
        shown = texts(opened, ".item:first-child .a-kd .text")
        assert shown == [said]
        assert texts(opened, ".item script, .item img") == []
    assert texts(opened, "main script, main img") == []
    choose(opened, "search", "maths-002")
    script = "const node = document.querySelector('.a-kd .text'); return [node.dir, getComputedStyle(node).unicodeBidi]"
    assert opened.execute_script(script) == ["auto", "plaintext"]


def test_filters(opened, evaluation):
    _, samples = evaluation
    sets: dict[tuple, dict] = {}
    for row in samples:
        sets.setdefault((row["id"], row["temperature"]), {})[row["arm"]] = row
    kept = [key for key, arms in sets.items() if key[0].startswith("maths") and key[1] == 0.7]
    assert choose(opened, "domain", "maths")[:2] == [28, 56]
    assert choose(opened, "temperature", "0.7")[0] == len(kept) == 14
    differing = [key for key in kept if len({row["outcome"] for row in sets[key].values()}) > 1]
    assert choose(opened, "differ", True)[0] == len(differing) > 0
    choose(opened, "differ", False)
    choose(opened, "arm", "kd")
    right = [key for key in kept if sets[key]["kd"]["outcome"] == "correct"]
    assert choose(opened, "outcome", "correct")[0] == len(right)
    assert 0 < len(right) < 14
    choose(opened, "arm", "")
    anyone = [key for key in kept if any(row["outcome"] == "correct" for row in sets[key].values())]
    assert choose(opened, "outcome", "correct")[0] == len(anyone) > len(right)
    choose(opened, "outcome", "")
    assert choose(opened, "search", "Question 3 of MATHS")[0] == 1
    assert choose(opened, "search", "no such words")[0] == 0
    assert texts(opened, ".item") == []


def test_more_is_shown_on_request(opened):
    for expected in (20, 40, 56):
        assert len(texts(opened, ".item")) == expected
        hidden = opened.execute_script("return document.getElementById('more').hidden")
        assert hidden == (expected == 56)
        opened.execute_script("document.getElementById('more').click()")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_at_two_widths(opened, page, width, theme):
    """Nothing sticks out of the page, text has a contrast of 4.5 to 1 at least, and the button turns the theme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    opened.get(page.as_uri())
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    script = """
      const shade = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v => v / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const paper = node => {
        const colour = getComputedStyle(node).backgroundColor;
        return colour === "rgba(0, 0, 0, 0)" ? paper(node.parentElement) : colour;
      };
      const chosen = "h1, h2 , p, li, dt, dd, summary, th, td, .text, .said *, label, .tick, .label";
      return [...document.querySelectorAll(chosen)].map(node => {
        const style = getComputedStyle(node);
        const [a, b] = [shade(node.tagName === "text" ? style.fill : style.color), shade(paper(node))];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      });"""
    assert min(opened.execute_script(script)) >= 4.5
    paper = "return getComputedStyle(document.body).backgroundColor"
    before = opened.execute_script(paper)
    assert opened.execute_script("return document.getElementById('theme').textContent") == (
        "Dark" if theme == "light" else "Light"
    )
    opened.execute_script("document.getElementById('theme').click()")
    after = opened.execute_script(paper)
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (before, after)]
    assert (lightness[0] > lightness[1]) == (theme == "light")


def test_a_large_evaluation_is_rendered_quickly(made_up, tmp_path):
    samples = made_up["samples"](117, domains=("maths", "ops", "code"))
    samples += [row | {"preset": "raw"} for row in samples]
    results = make_results(samples, made_up["heldout"](), made_up["context"](), 0)
    start = process_time()
    write_reports(tmp_path, results, samples)
    assert len(samples) > 8400
    assert process_time() - start < 5


@pytest.mark.parametrize(("samples", "heldout", "missing"), [
    (0, 40, []), (12, 0, ["sft"]), (12, 40, ["base"]), (12, 0, ["kd"]), (12, 0, ["base", "sft", "teacher"]), (1, 1, []),
])  # fmt: skip
def test_a_page_is_made_of_whatever_there_is(made_up, tmp_path, samples, heldout, missing):
    arms = [arm for arm in ARMS if arm not in missing]
    rows = made_up["samples"](samples, arms=arms)
    held = made_up["heldout"](heldout, arms=[arm for arm in arms if arm != "teacher"])
    results = make_results(rows, held, made_up["context"](dict.fromkeys(missing, "not asked for")), 0)
    write_reports(tmp_path, results, rows)
    assert escape(results["headline"]) in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("SFT control is the same student" in (tmp_path / "report.html").read_text()) == ("sft" in arms)


def test_the_name_of_a_domain_is_text(made_up, tmp_path):
    name = "<img src=x onerror='document.title=1'>\"{{ 7 * 7 }}"
    rows = made_up["samples"](8, domains=(name, "maths"))
    write_reports(tmp_path, make_results(rows, [], made_up["context"](), 0), rows)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img" not in text
    assert "&lt;img src=x" in text
    assert "{{ 7 * 7 }}" in text


def test_answers_that_were_not_executed_have_no_place_in_the_picture(made_up, tmp_path):
    rows = [row | {"outcome": "not_executed"} for row in made_up["samples"](8, domains=("code",))]
    write_reports(tmp_path, make_results(rows, [], made_up["context"](), 0), rows)
    assert "not executed</text>" in (tmp_path / "report.html").read_text()


def test_every_text_is_escaped_by_the_template():
    template = TEMPLATE.read_text()
    assert not re.search(r"\|\s*safe|autoescape\s+false", template)
    assert not re.search(r"\{[{%#]", re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1])


def test_the_template_is_shipped():
    import tomllib

    settings = tomllib.loads((TEMPLATE.parents[2] / "pyproject.toml").read_text())
    assert TEMPLATE.name in settings["tool"]["setuptools"]["package-data"]["src.report"]
