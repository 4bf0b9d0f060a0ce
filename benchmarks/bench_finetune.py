"""Fine-tuning beside the same recipe in Transformers' Trainer; fastlm/bench/finetuning.py says how.

python benchmarks/bench_finetune.py --model MINILM --data rt-polarity
python benchmarks/bench_finetune.py --model MINILM --data rt-polarity --whole --seeds 5 --json finetune.json
python benchmarks/bench_finetune.py --task tag --model MINILM --data train.conll --set data.validation=dev.conll
"""

from fastlm.bench.finetuning import main
from fastlm.bench.results import exit_with

if __name__ == "__main__":
    exit_with(main)
