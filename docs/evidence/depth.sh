#!/bin/sh
# Accuracy against depth: repeats docs/evidence/depth. Two runs side by side, one thread each; ten hours on two cores.
#   sh docs/evidence/depth.sh CIFAR10 OUTPUT
# CIFAR10 is an image folder. A second call continues what was interrupted.
set -eu
data=$1 output=$2
trial() {
    name=$1 depths=$2 epochs=$3 seeds=$4
    shift 4
    repopt-timm trial repopt_vgg -c cifar10_trial --amp --amp-dtype bfloat16 --channels-last --data "$data" \
        --train-images 20000 --model-kwargs "depths=$depths" 'widths=(24,24,48,96,192)' --epochs "$epochs" \
        --warmup-epochs $((epochs / 4)) --val-interval $((epochs > 4 ? 4 : 2)) --tuning-epochs "$epochs" \
        --seeds "$seeds" --jobs 2 --threads 1 --output "$output/$name" --arms "$@"
}
trial 22 '(2,4,14,1)' 4 3 branches unit_branches sgd init repopt
trial 32 '(4,7,19,1)' 4 3 branches unit_branches sgd init repopt
trial 48 '(8,14,24,1)' 4 3 branches unit_branches sgd dirac init repopt identity
trial 94 '(16,28,48,1)' 4 3 branches sgd init repopt
trial 22-long '(2,4,14,1)' 16 5 branches unit_branches sgd adamw dirac init repopt identity
trial 48-long '(8,14,24,1)' 16 4 branches unit_branches sgd adamw dirac init repopt identity
repopt-timm trial --report "$output/22" "$output/32" "$output/48" "$output/94" "$output/22-long" "$output/48-long" \
    --reference repopt --output "$output/depth"
