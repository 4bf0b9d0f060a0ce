"""What measures: ops and training steps beside their peers, timing, memory, profiles, reports.

clock       the clock of every measurement; tests hand in a fake one
timing      interleaved rounds
memory      peak and present memory of a process or a device
ceilings    a large copy and a large matrix product
peers/      one file per library: what a user would run instead of an op, or of a training step
ops         every op beside its peers (benchmarks/bench_ops.py), with op_runner, op_worker, passes
training    a training step beside Transformers' (benchmarks/bench_train.py), with steps, step_contenders,
            step_worker, job, compare
host        what a call costs the host (benchmarks/bench_host.py)
check       ratios to the best peer, against the recorded ones (benchmarks/bench_check.py)
results     rows with their provenance, and plots
report      pages and the README's block from recorded results (benchmarks/report.py)
static_report   what the compilers made of the kernels (benchmarks/static_report.py), and predicted times, with sass,
            kernel_model, predicted
profile     `fastlm profile`
tune        `fastlm tune`
"""
