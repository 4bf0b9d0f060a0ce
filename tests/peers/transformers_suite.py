"""Transformers' own tests of models, from the sdist of the installed version, with and without fastlm.patch.

    pip download --no-binary :all: --no-deps transformers==VERSION && tar xf transformers-VERSION.tar.gz
    python tests/peers/transformers_suite.py transformers-VERSION/tests [--model REGEX] [--test REGEX]

The sdist holds ModelTesterMixin (tests/test_modeling_common.py), which needs the package `parameterized`; the tests of
single models, of generate and of exporters are not in it. Every class of the families in fastlm/hf/_families.py gets a
test case of that mixin, with the tiny configuration of tests/hf_models.py. Each test runs unpatched; if it passes, it
runs again, and each model is patched when the test first moves it or sets its mode. A test that fails only then is
printed, with its error, and the exit status is 1.
"""

import argparse
import collections
import contextlib
import importlib
import re
import sys
import time
import types
import unittest
import warnings
from pathlib import Path
from unittest import mock

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import hf_models  # noqa: E402

import fastlm  # noqa: E402
from fastlm.hf import _families  # noqa: E402

ROWS, LENGTH = 3, 7
# The key of hf_models.MODELS with the configuration of a family, where it is another than the family's name.
CONFIGURATIONS = {"t5": "t5-gated"}
LEFT = (
    "test_generation_tester_mixin_inheritance",  # it asks for a mixin that is not in the sdist
    "test_sdpa_can_dispatch_non_composite_models",  # it asserts that the attention's name is "sdpa"
)


def common(tests: Path):
    """The module test_modeling_common. What it imports from files that the sdist leaves out is an empty mixin."""
    package = types.ModuleType("tests")
    package.__path__ = [str(tests)]
    sys.modules["tests"] = package
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        module = types.ModuleType(f"tests.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules[f"tests.{name}"] = module
        sys.modules[f"tests.{name.partition('.')[0]}"] = types.ModuleType(f"tests.{name.partition('.')[0]}")
    return importlib.import_module("tests.test_modeling_common")


class Tester:
    """What ModelTesterMixin asks of `model_tester`: a configuration and a batch."""

    batch_size, seq_length, num_choices = ROWS, LENGTH, 2
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32
    is_training = True

    def __init__(self, family: str, cls: type):
        self.family, self.cls = family, cls
        self.both = family == "t5" and cls.__name__ not in ("T5EncoderModel", "T5ForTokenClassification")
        self.num_hidden_layers = self.get_config().num_hidden_layers

    def get_config(self):
        _, config, arguments = hf_models.MODELS[CONFIGURATIONS.get(self.family, self.family)]
        return getattr(transformers, config)(**arguments)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(5, hf_models.VOCABULARY, (ROWS, LENGTH))
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.both:
            if self.cls.__name__ == "T5ForSequenceClassification":
                ids[:, -1] = 2  # it reads the state of the end of the text
            return self.get_config(), inputs | {
                "decoder_input_ids": ids.clone(),
                "decoder_attention_mask": mask.clone(),
            }
        return self.get_config(), inputs


def case(module, family: str, cls: type) -> type:
    def set_up(self):
        torch.manual_seed(0)
        self.model_tester = Tester(family, cls)

    members = {
        "setUp": set_up,
        "all_model_classes": (cls,),
        "is_encoder_decoder": Tester(family, cls).both,
        "__module__": __name__,
    }
    return type(cls.__name__, (module.ModelTesterMixin, unittest.TestCase), members)


def cases(module):
    for family in _families.MODULES:
        models = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name in models.__all__:
            cls = getattr(models, name)
            if (
                isinstance(cls, type)
                and issubclass(cls, transformers.PreTrainedModel)
                and not name.endswith("PreTrainedModel")
            ):
                yield case(module, family, cls)


@contextlib.contextmanager
def patching(fused_loss: bool):
    """Patches each model of a known family when `to`, `train` or `eval` is first called."""

    def patched(method):
        def call(self, *args, **kwargs):
            if self.config.model_type in _families.MODULES and "_fastlm_configs_before" not in self.__dict__:
                fastlm.patch(self, fused_loss=fused_loss)
            return method(self, *args, **kwargs)

        return call

    cls = transformers.PreTrainedModel
    with contextlib.ExitStack() as stack:
        for name in ("to", "train", "eval"):
            stack.enter_context(mock.patch.object(cls, name, patched(getattr(cls, name))))
        yield


def error(test, fused_loss=None) -> str | None:
    """None if it passes, "skipped", or the last line of the error."""
    result = unittest.TestResult()
    with warnings.catch_warnings(), patching(fused_loss) if fused_loss is not None else contextlib.nullcontext():
        warnings.simplefilter("ignore")
        test.run(result)
    torch.set_grad_enabled(True)
    torch._dynamo.reset()
    failed = result.failures + result.errors
    if failed:
        lines = [line for line in failed[0][1].splitlines() if line.strip()]
        return next(
            (line for line in reversed(lines) if re.match(r"\w+(\.\w+)*(Error|Exception|Warning)", line)), lines[-1]
        )
    return "skipped" if result.skipped else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tests", type=Path, help="the directory tests of the unpacked sdist")
    parser.add_argument("--model", default="", help="a regular expression of the names of classes")
    parser.add_argument("--test", default="", help="a regular expression of the names of tests")
    parser.add_argument("--fused-loss", action="store_true", help="fastlm.patch(model, fused_loss=True)")
    options = parser.parse_args()
    if not (options.tests / "test_modeling_common.py").is_file():
        parser.error(f"tests: expected the directory with test_modeling_common.py, got {options.tests}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    module, total, failing = common(options.tests.resolve()), collections.Counter(), 0
    for cls in cases(module):
        if not re.search(options.model, cls.__name__):
            continue
        counts, start = collections.Counter(), time.monotonic()
        for test in unittest.TestLoader().loadTestsFromTestCase(cls):
            name = test._testMethodName
            if name in LEFT or not re.search(options.test, name):
                continue
            before = error(test)
            if before is not None:
                counts["skipped" if before == "skipped" else "fail unpatched"] += 1
                continue
            after = error(cls(name), options.fused_loss)
            counts["pass" if after in (None, "skipped") else "fail patched"] += 1
            if after not in (None, "skipped"):
                print(f"  {cls.__name__}.{name}: {after}", flush=True)
        total += counts
        numbers = ", ".join(f"{key} {counts[key]}" for key in ("pass", "fail patched", "fail unpatched", "skipped"))
        print(f"{cls.__name__}: {numbers} ({time.monotonic() - start:.0f} s)", flush=True)
    print("total: " + ", ".join(f"{key} {total[key]}" for key in ("pass", "fail patched", "fail unpatched", "skipped")))
    failing = total["fail patched"]
    return 1 if failing or not total["pass"] else 0


if __name__ == "__main__":
    sys.exit(main())
