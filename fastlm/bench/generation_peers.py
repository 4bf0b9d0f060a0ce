"""A program that generates with one other library, for fastlm/bench/generation.py, which starts it.

python generation_peers.py SPEC, a JSON object. It knows nothing of fastlm: it runs in the Python that has the library.
It reads one number of new tokens a line, generates as many for each prompt, and writes a line of JSON with the seconds
and the ids. A first line says {"ready": true}, or {"missing": why}.

SPEC: library ("ctranslate2" or "onnxruntime"), family ("gpt2" or "t5"), weights, threads, prompts (lists of ids),
model (a directory in Transformers' layout), scratch (a directory for converted models).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path


def word(id: int) -> str:
    """The token of an id, in the tokenizer beside the model."""
    return f"w{id}"


def ctranslate2_generator(spec: dict):
    import ctranslate2

    converted = Path(spec["scratch"]) / "ctranslate2"
    if not converted.exists():
        ctranslate2.converters.TransformersConverter(spec["model"]).convert(str(converted))
    options = {"device": "cpu", "compute_type": spec["weights"], "inter_threads": 1, "intra_threads": spec["threads"]}
    prompts = [[word(id) for id in prompt] for prompt in spec["prompts"]]
    if spec["family"] == "t5":
        translator = ctranslate2.Translator(str(converted), **options)

        def write(tokens: int) -> list[list[int]]:
            results = translator.translate_batch(
                prompts, beam_size=1, max_decoding_length=tokens, min_decoding_length=tokens
            )
            return [[int(token[1:]) for token in result.hypotheses[0]] for result in results]

        return write
    generator = ctranslate2.Generator(str(converted), **options)

    def write(tokens: int) -> list[list[int]]:
        results = generator.generate_batch(
            prompts, beam_size=1, max_length=tokens, min_length=tokens, include_prompt_in_result=False
        )
        return [result.sequences_ids[0] for result in results]

    return write


def onnxruntime_generator(spec: dict):
    """A step of GPT-2 with past keys and values, which fastlm/bench/generation_onnx.py has exported."""
    import numpy as np
    import onnxruntime

    if spec["family"] != "gpt2":
        raise RuntimeError("only GPT-2 is exported")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = spec["threads"], 1
    path = Path(spec["scratch"]) / "onnx" / "step.onnx"
    if not path.exists():
        raise RuntimeError("no exported model; give --onnx-python")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    prompts = np.array(spec["prompts"], dtype=np.int64)  # of one length
    past = next(given for given in session.get_inputs() if given.name == "past").shape  # (layers, 2, rows, H, seen, d)

    def write(tokens: int) -> list[list[int]]:
        ids, seen, out = prompts, 0, []
        # Bound to the runtime's own memory, so that keys and values are not copied to numpy and back.
        kept = onnxruntime.OrtValue.ortvalue_from_numpy(
            np.zeros((past[0], 2, len(prompts), past[3], 0, past[5]), dtype=np.float32)
        )
        for _ in range(tokens):
            binding = session.io_binding()
            binding.bind_cpu_input("ids", ids)
            binding.bind_cpu_input("positions", np.arange(seen, seen + ids.shape[1], dtype=np.int64))
            binding.bind_ortvalue_input("past", kept)
            binding.bind_output("logits")
            binding.bind_output("present")
            session.run_with_iobinding(binding)
            logits, kept = binding.get_outputs()
            seen += ids.shape[1]
            ids = logits.numpy().argmax(-1)[:, None]
            out.append(ids[:, 0])
        return np.stack(out, 1).tolist()

    return write


GENERATORS = {"ctranslate2": ctranslate2_generator, "onnxruntime": onnxruntime_generator}


def main(spec: dict) -> None:
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what the libraries print
        try:
            write = GENERATORS[spec["library"]](spec)
        except Exception as error:  # the row then says why it is missing
            print(json.dumps({"missing": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
            return
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            began = time.perf_counter()
            ids = write(int(line))
            print(json.dumps({"seconds": time.perf_counter() - began, "ids": ids}), file=answers, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
