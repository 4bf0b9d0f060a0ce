"""A step of generation on a CPU beside Transformers, CTranslate2 and ONNX Runtime; fastlm/bench/generation.py says how.

python benchmarks/bench_generation.py --peers-python peers/bin/python --onnx-python onnx/bin/python --json gen.json

peers: pip install torch transformers ctranslate2 onnxruntime. onnx: torch onnx onnxscript safetensors.
"""

from fastlm.bench.generation import main
from fastlm.bench.results import exit_with

if __name__ == "__main__":
    exit_with(main)
