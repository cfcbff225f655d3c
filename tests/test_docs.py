"""Pages, pictures and generated tables are complete and up to date; what the site does to them when it is built."""

import inspect
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import modeling_heptapod
from docs import generate, griffe_auto_docstring, hooks
from docs.figures import draw
from modeling_heptapod import make_axis


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CONFIGS = {
    "leap": "LeapConfig",
    "hierarchical_lm": "HierarchicalLMConfig",
    "heptapod": "HeptapodConfig",
    "multigrid": "MultiGridConfig",
}
LINK = re.compile(r"(?:\]\(|^\[[\w-]+\]: )([^)\s]+)\)?", re.MULTILINE)


def text_of(path):
    return path.read_text(encoding="utf-8")


def prose(path):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text_of(path), flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """Those of the headings of a page, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- pictures ----------------------------------------------------------------------------------------------------------


def test_pictures_are_those_that_the_script_draws():
    drawn = draw.draw_all()
    assert {path.stem for path in (DOCS / "figures").glob("*.svg")} == set(drawn)
    for name, text in drawn.items():
        assert text_of(DOCS / "figures" / f"{name}.svg") == text, f"{name}.svg: run `python docs/figures/draw.py`"


@pytest.mark.parametrize("name", draw.PICTURES)
def test_a_picture_stays_on_its_sheet_and_fetches_nothing(name):
    picture = draw.PICTURES[name]()
    root = ElementTree.fromstring(picture.svg())
    space = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{space}title").text and root.find(f"{space}desc").text
    assert "prefers-color-scheme: dark" in root.find(f"{space}style").text
    assert not re.search(r"href|url\(|<script|<image", picture.svg())
    for rect in root.iter(f"{space}rect"):
        x, y, width, height = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
        assert 0 <= x and x + width <= picture.width and 0 <= y and y + height <= picture.height
    for text in root.iter(f"{space}text"):
        # A letter of DejaVu Sans, the widest of the fonts, takes about half of its size.
        size = {"title": 17, "small": 11.5, "label": 11.5, "code": 12}.get(text.get("class"), 13)
        length = 0.53 * size * len(text.text)
        left = float(text.get("x")) - length * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")]
        assert 0 <= left and left + length <= picture.width, text.text
        assert 0 < float(text.get("y")) < picture.height, text.text


def test_the_drawn_tracks_are_those_of_the_annotators():
    for name, labels in draw.TRACKS.items():
        axis = make_axis(name)
        assert [axis.vocabulary[axis_id] for axis_id in axis.annotate(draw.TEXT)] == list(labels)


def test_badges_say_what_pyproject_says():
    badges = draw.badges()
    assert ">MIT<" in badges["badge-licence"] and "&gt;=3.10" in badges["badge-python"]


# --- generated parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", generate.pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_generated_parts_are_up_to_date(path):
    assert generate.generate(path, text_of(path)) == text_of(path), "run `python docs/generate.py`"


def test_generated_parts_are_where_they_belong():
    for family, name in CONFIGS.items():
        assert f"<!-- config:{name} -->" in text_of(DOCS / "families" / f"{family}.md")
    for page, parts in {ROOT / "README.md": "models:all figures:all", DOCS / "publishing.md": "models:all"}.items():
        assert all(f"<!-- {part} -->" in text_of(page) for part in parts.split())
    pages = text_of(DOCS / "benchmarks.md") + text_of(DOCS / "experiments.md")
    shown = set(re.findall(r"<!-- bench:(\w+) -->", pages))
    assert shown == set(generate.tables.read_results()) - {"training_step_huge_pages"}  # which is told in a sentence
    assert "training_step_huge_pages.json" in pages


@pytest.mark.parametrize("name", CONFIGS.values())
def test_every_field_of_a_config_is_described(name):
    config_class = getattr(modeling_heptapod, name)
    fields = [field.name for field in generate.own_fields(config_class)]
    documented = generate.documented_fields(config_class)
    assert set(documented) <= set(fields) and all(len(words) > 10 for words in documented.values())
    rows = generate.config_table(name).splitlines()[2:]
    assert [re.match(r"\| `(\w+)` \| `.*?` \| \S", row)[1] for row in rows] == fields
    written = config_class().to_dict()
    beyond = {"hidden_size"} | set(fields)
    assert {"vocab_size", "num_hidden_layers", "initializer_range"} < set(fields) <= beyond | set(written)


def test_a_field_that_nothing_describes_is_an_error(monkeypatch):
    monkeypatch.delitem(generate.COMMON, "vocab_size")
    with pytest.raises(KeyError, match="vocab_size"):
        generate.config_table("LeapConfig")


def test_figures_are_those_of_the_results(monkeypatch):
    lines = generate.figure_lines()
    assert len(re.findall(r"^- ", lines, re.MULTILINE)) == 4 and lines.count("`python") == 4
    results = generate.tables.read_results()
    (row,) = [r for r in results["training_step"][0]["rows"] if r["length"] == 16384]
    row["GPT2 over ours"] = 123.4
    monkeypatch.setattr(generate.tables, "read_results", lambda: results)
    assert "123.4 times as fast" in generate.figure_lines() != lines


# --- pages -------------------------------------------------------------------------------------------------------------


def test_the_front_page_is_short():
    lines = text_of(ROOT / "README.md").splitlines()
    assert len(lines) <= 250
    assert not [line for line in lines if len(line) > 140]
    headings = re.findall(r"^## (.*)$", prose(ROOT / "README.md"), re.MULTILINE)
    contents = text_of(ROOT / "README.md").split("**Contents:**")[1].split("\n\n")[0]
    assert re.findall(r"\[(.*?)\]", contents) == headings


def test_links_of_the_front_page_lead_somewhere():
    for link in LINK.findall(prose(ROOT / "README.md")):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            path = ROOT / (name or "README.md")
            assert path.is_file(), link
            assert not anchor or anchor in anchors(path), link


def test_every_page_is_in_the_navigation():
    def leaves(entry):
        return [entry] if isinstance(entry, str) else [leaf for part in _parts(entry) for leaf in leaves(part)]

    def _parts(entry):
        return list(entry.values()) if isinstance(entry, dict) else entry

    nav = leaves(yaml.safe_load(text_of(ROOT / "mkdocs.yml"))["nav"])
    assert sorted(nav) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_pages_show_no_picture_of_another_machine():
    for path in generate.pages():
        for target in re.findall(r"!\[.*?\]\((.*?)\)", prose(path)):
            assert (path.parent / target).resolve().is_file(), f"{path}: {target}"


def test_public_names_are_in_the_api_reference():
    shown = re.findall(r"^::: (\S+)$", "\n".join(map(text_of, (DOCS / "api").glob("*.md"))), re.MULTILINE)
    assert len(set(shown)) == len(shown)
    for name in modeling_heptapod.__all__:
        item = getattr(modeling_heptapod, name)
        assert f"{item.__module__}.{item.__qualname__}" in shown, name
    for path in shown:
        module, _, name = path.rpartition(".")
        assert inspect.getmodule(getattr(__import__(module, fromlist=[name]), name)).__name__ == module


def test_extras_are_those_of_pyproject():
    project = text_of(ROOT / "pyproject.toml").split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = {
        name: {re.match(r"[\w-]+", package)[0] for package in re.findall(r'"(.*?)"', packages)}
        for name, packages in re.findall(r"^(\w+) = \[(.*)\]$", project, re.MULTILINE)
    }
    table = text_of(DOCS / "getting_started.md").split("| extra |")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE))
    assert {name: set(packages.split(", ")) for name, packages in rows.items()} == {
        name: packages for name, packages in extras.items() if name not in ("test", "parity")
    }
    section = text_of(ROOT / "README.md").split("\nExtras: ")[1].split("(")[0]
    assert set(re.findall(r"`(\w+)`", section)) == set(rows)


def test_regions_are_all_explained():
    from modeling_heptapod.heptapod.processing_heptapod import REGIONS

    section = text_of(DOCS / "families" / "heptapod.md").split("## Pages and `mask_region`")[1].split("\n## ")[0]
    assert all(f'`"{region}"`' in section for region in REGIONS)


# --- what the site does ------------------------------------------------------------------------------------------------


def test_equations_become_mathml():
    found = 0
    for path in DOCS.rglob("*.md"):
        text = re.sub(r"`[^`\n]*`", "", prose(path))
        for tex in re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL) + re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", text):
            element = ElementTree.fromstring(hooks.mathml(tex, "block"))
            assert "\\" not in "".join(element.itertext()), tex
            found += 1
    assert found > 40
    page = hooks.on_page_content('<p><span class="arithmatex">\\(x_i &lt; 1\\)</span> and <code>\\(x\\)</code></p>')
    assert page.startswith('<p><math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">')
    assert page.endswith(" and <code>\\(x\\)</code></p>") and "arithmatex" not in page
    assert "".join(ElementTree.fromstring(page).find(".//{*}math").itertext()) == "xi<1"


def test_pictures_of_other_folders_are_found_from_any_page():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="families/heptapod.md"))
    assert hooks.on_page_markdown("![a](../../hub_cards/infilling.png)", page) == "![a](../figures/infilling.png)"
    page.file.src_uri = "experiments.md"
    assert hooks.on_page_markdown("![a](../tests/x/y.png)", page) == "![a](figures/y.png)"


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://elsewhere/x.js"></script>',
        '<img alt="" src="//elsewhere/x.png">',
        '<link href="https://elsewhere/x.css" rel="stylesheet">',
        '<link rel="preconnect" href="https://elsewhere" crossorigin>',
        "@import 'https://elsewhere/x.css';",
        "src: url(https://elsewhere/x.woff2)",
    ],
)
def test_a_page_that_would_fetch_from_elsewhere_is_refused(text, tmp_path):
    (tmp_path / "page.html").write_text('<a href="https://elsewhere">a link</a>')
    hooks.on_post_build(SimpleNamespace(site_dir=tmp_path))
    (tmp_path / "style.css" if "<" not in text else tmp_path / "page.html").write_text(text)
    with pytest.raises(hooks.PluginError, match="would fetch from another machine"):
        hooks.on_post_build(SimpleNamespace(site_dir=tmp_path))


def test_docstrings_get_what_auto_docstring_adds():
    text = "width (`int`, *optional*):\n    Of a [`Thing`].\n    More.\n\nExample:\n\n```python\n>>> 1\n```"
    tidied = griffe_auto_docstring.tidy(text, True, True)
    assert tidied.startswith(
        "Attributes:\n    width (int, optional):\n        Of a `Thing`.\n        More.\n\nExample:"
    )
    assert griffe_auto_docstring.tidy(text, True, False).startswith("Args:\n")
    assert griffe_auto_docstring.tidy("A sentence (with a clause).", True, False) == "A sentence (with a clause)."
    assert griffe_auto_docstring.tidy("Do it.\n\nArgs:\n    x (`int`): it.", False, False).endswith(
        "    x (`int`): it."
    )
