#!/usr/bin/env bash
# The small half of the paper's experiment, from nothing to RESULTS.md: `make paper`. Hours on two cores. Interrupt it
# whenever you like: every command below continues where it was, or says that it is finished.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
here=benchmarks/maxent runs=runs/maxent

[ -f $runs/corpus/start/config.json ] || python $here/corpus.py $runs/corpus
keel sft $here/sft.yaml
keel label $here/label.yaml
keel reward $here/reward.yaml
keel reward $here/reward-minilm.yaml
for grid in sweep sweep-low sweep-guard sweep-more; do
  keel sweep $here/$grid.yaml
done

offline=()
for seed in 0 1 2; do
  for name in simpo dpo rpo; do
    case $name in
      simpo) objective=(objective.loss=simpo) ;;
      dpo) objective=(objective.loss=dpo objective.beta=0.1 objective.target_margin=0) ;;
      rpo) objective=(objective.loss=dpo objective.beta=0.1 objective.target_margin=0
        objective.likelihood_coefficient=0.0005) ;;
    esac
    folder=$runs/offline/$name/seed-$seed
    keel prefer $here/prefer.yaml run.name="$name" run.seed="$seed" run.directory="$folder" "${objective[@]}"
    [ -f "$folder/evaluation/evaluation.arrow" ] || keel evaluate "$folder" --config $here/train.yaml
    offline+=("$name=$folder/evaluation/evaluation.arrow")
  done
done
python $here/collect.py $runs/sweep $runs/sweep-low $runs/sweep-guard $runs/sweep-more --offline "${offline[@]}" --output $here
python $here/results.py
