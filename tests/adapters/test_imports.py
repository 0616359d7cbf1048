import subprocess
import sys

import pytest


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_adapters_imports_no_other_library():
    foreign = ("timm", "transformers", "torchvision", "triton")
    done = run(f"import granvit, granvit.adapters, sys; print([m for m in {foreign} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(("library", "extra"), [("timm", "demo"), ("transformers", "train")])
def test_a_missing_library_is_one_clear_sentence(library, extra):
    done = run(f"import sys; sys.modules[{library!r}] = None; import granvit; granvit.adapters.{library}.RegionEncoder")
    last = done.stderr.strip().splitlines()[-1]
    sentence = f"granvit.adapters.{library} needs {library}: pip install {library}, or granvit[{extra}]"
    assert last == f"granvit.errors.MissingDependencyError: {sentence}"


def test_submodules_appear_on_first_use():
    from granvit import adapters

    assert set(adapters.__all__) <= set(dir(adapters))
    assert adapters.segment_anything.BoxPromptEncoder.__module__ == "granvit.adapters.segment_anything"
    with pytest.raises(AttributeError, match="no attribute 'detectron'"):
        adapters.detectron  # noqa: B018
