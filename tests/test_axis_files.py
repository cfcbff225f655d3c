"""Axis classes in files of their own: loaded by path, saved beside a processor, and loaded from the folder anywhere."""

import itertools
import json
import pickle

import pytest
from corpora import build_tokenizer
from transformers import AutoProcessor

from modeling_heptapod import AffixAxis, MultiGridProcessor
from modeling_heptapod.multigrid.axes import AXIS_CLASSES
from modeling_heptapod.multigrid.axis_files import load_axis_class
from tests.clean_room import run_alone, run_beside
from tests.tiny_multigrid import tiny_multigrid


VOWELS = '''"""An axis of one's own; é."""

from dataclasses import dataclass

from modeling_heptapod import (
    Axis as Base,
    find_lookahead,
)
from modeling_heptapod.multigrid.axes import Automaton


@dataclass
class Letters:
    vowels: str = "aeiou"


class Vowels(Base):
    def __init__(self, name="vowels", letters="aeiou"):
        super().__init__(name, ("no", "yes"))
        self.letters = Letters(letters)

    def start(self):
        return 0

    def step(self, state, characters):
        for character in characters:
            state = int(character in self.letters.vowels)
        return state, state

    def arguments(self):
        return {"letters": self.letters.vowels}
'''
# Of "an axis é\n": of the two bytes of a letter the last one completes it.
SOME = [int(character in "eio") for character in "an axis "] + [0, 0, 0]
IDS = [int(character in "aeiou") for character in "an axis "] + [0, 0, 0]


def write(folder, source=VOWELS, name="my_axis.py"):
    (folder / name).write_text(source, encoding="utf-8")
    return folder / name


@pytest.fixture
def vowels(tmp_path):
    return load_axis_class(write(tmp_path), "Vowels")


def save(folder, *axes):
    processor = MultiGridProcessor(build_tokenizer("byte", []), axes)
    names = {"axis_names": processor.axis_names, "axis_vocab_sizes": processor.axis_vocab_sizes}
    processor.save_pretrained(folder)
    tiny_multigrid(vocab_size=len(processor.tokenizer), **names).save_pretrained(folder)
    return processor


ALONE = """
from transformers import AutoModelForCausalLM, AutoProcessor
source, target = sys.argv[1:]
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
inputs = processor("an axis \\u00e9\\n", return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=3, do_sample=False, axis_source="annotated", processor=processor)
print(inputs["axis_ids"][0].tolist(), [type(axis).__module__.split(".")[0] for axis in processor.axes], written.shape)
processor.save_pretrained(target)
model.save_pretrained(target)
"""


@pytest.mark.slow
def test_a_folder_with_an_axis_of_ones_own_loads_anywhere(vowels, tmp_path):
    """Without this package, and once more from what is saved there."""
    save(tmp_path / "saved", "bracket", vowels(letters="eio"), vowels("vowels2"))
    sources = [tmp_path / name for name in ("saved", "again", "third")]
    for number, (source, target) in enumerate(itertools.pairwise(sources)):
        printed = run_alone(ALONE, tmp_path, source, target, home=f"home{number}").splitlines()[-1]
        assert printed.startswith(f"[{[0] * 11}, {SOME}, {IDS}] ")
        assert printed.endswith(f"{['transformers_modules'] * 3} torch.Size([1, 14])")
        code = (target / "processing_multigrid.py").read_text(encoding="utf-8")
        assert code.count("from .my_axis import Vowels") == 1
        assert json.loads((target / "processor_config.json").read_text())["auto_map"]["Vowels"] == "my_axis.Vowels"
    source = (tmp_path / "saved" / "my_axis.py").read_text(encoding="utf-8")
    assert source == (tmp_path / "again" / "my_axis.py").read_text(encoding="utf-8")
    assert (
        "from .axes import Axis as Base; from .axes import find_lookahead\nfrom .axes import Automaton\n" in source
        and "modeling_heptapod" not in source
    )


@pytest.mark.slow
def test_beside_this_package_the_file_of_a_folder_runs_where_it_is_allowed(vowels, tmp_path):
    save(tmp_path / "saved", vowels())
    (tmp_path / "my_axis.py").unlink()
    code = f"""
import modeling_heptapod
from transformers import AutoProcessor
try:
    AutoProcessor.from_pretrained({str(tmp_path / "saved")!r})
except ValueError as error:
    assert "is of class 'Vowels'" in str(error) and "trust_remote_code=True" in str(error), error
else:
    raise SystemExit("the file ran without permission")
processor = AutoProcessor.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
assert type(processor) is modeling_heptapod.MultiGridProcessor and isinstance(processor.axes[0], modeling_heptapod.Axis)
processor.save_pretrained({str(tmp_path / "again")!r})
print(processor("an axis \\u00e9\\n")["axis_ids"])
"""
    assert json.loads(run_beside(code)) == [[IDS]]
    files = [(tmp_path / name / "my_axis.py").read_text(encoding="utf-8") for name in ("saved", "again")]
    assert files[0] == files[1]


def test_each_folder_has_its_own_class(tmp_path):
    """Of two files of one name, and of a file that has changed, each is what it says."""
    for name, letters in (("one", "aeiou"), ("two", "xyz")):
        (tmp_path / name).mkdir()
        path = write(tmp_path / name, VOWELS.replace('letters="aeiou"', f'letters="{letters}"'))
        save(tmp_path / name / "saved", load_axis_class(path, "Vowels")())
    for name in ("one", "two", "one"):
        processor = AutoProcessor.from_pretrained(tmp_path / name / "saved", trust_remote_code=True)
        assert processor.axes[0].annotate("axy") == ([1, 0, 0] if name == "one" else [0, 1, 1])
    changed = write(tmp_path / "one", VOWELS.replace('letters="aeiou"', 'letters="a"'))
    assert load_axis_class(changed, "Vowels")().annotate("ae") == [1, 0]
    processor.save_pretrained(tmp_path / "before")  # of the class that was loaded before
    assert (tmp_path / "before" / "my_axis.py").read_bytes() == (
        tmp_path / "one" / "saved" / "my_axis.py"
    ).read_bytes()
    assert load_axis_class(changed, "Vowels") is load_axis_class(changed, "Vowels") is AXIS_CLASSES["Vowels"]


def test_a_class_from_a_file_is_a_class_like_others(vowels):
    axis = vowels(letters="x")
    assert (
        pickle.loads(pickle.dumps(axis)).to_dict()
        == axis.to_dict()
        == {"class": "Vowels", "name": "vowels", "letters": "x"}
    )


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (
            VOWELS,
            "python_axes.py",
            "must be named like a Python module, and like none of this package, got 'python_axes.py'",
        ),
        (VOWELS, "losses.py", "like none of this package, got 'losses.py'"),
        (VOWELS, "my-axis.py", "must be named like a Python module"),
        (VOWELS, "my_axis.txt", "must be named like a Python module.* got 'my_axis.txt'"),
        (VOWELS.replace("Vowels", "Consonants"), "other.py", "must define the class 'Vowels'"),
        ("from modeling_heptapod import AffixAxis as Vowels", "other.py", "must define the class 'Vowels'"),
        ("class Vowels: pass", "other.py", "Vowels in .*other.py must be a subclass of `Axis`"),
        ("class Vowels(: pass", "other.py", "other.py, line 1 cannot be imported: SyntaxError: invalid syntax"),
        (
            "import not_installed_anywhere",
            "other.py",
            "cannot be imported: ModuleNotFoundError: No module named 'not_installed_anywhere'",
        ),
        (
            f"{VOWELS}\nclass AffixAxis(Base): pass\n",
            "other.py",
            "its class AffixAxis has the name of one in .*text_axes.py: rename one of them",
        ),
        ("import modeling_heptapod", "other.py", "line 1: names of this package must be imported as"),
        ("from .helper import x", "other.py", "line 1: an axis must be in one file"),
        ("x = 1\nfrom modeling_heptapod import LeapConfig", "other.py", "line 2: .* can be imported, got LeapConfig"),
    ],
)
def test_files_that_hold_no_axis_are_named(source, name, message, tmp_path):
    before = dict(AXIS_CLASSES)
    with pytest.raises(ValueError, match=message):
        load_axis_class(write(tmp_path, source, name), "Vowels")
    assert AXIS_CLASSES["AffixAxis"] is before["AffixAxis"] is AffixAxis
    with pytest.raises(ValueError, match="there is no file .*nowhere.py"):
        load_axis_class(tmp_path / "nowhere.py", "Vowels")


def test_a_tree_from_a_file_can_be_written_as_python(tmp_path):
    """Its class is given no attribute that a built-in axis has for something else."""
    source = "from modeling_heptapod import DecisionTreeAxis\n\n\nclass Leaf(DecisionTreeAxis):\n    pass\n"
    assert "return 0" in load_axis_class(write(tmp_path, source, "leaf.py"), "Leaf")().to_python()
