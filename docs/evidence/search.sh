#!/bin/sh
# What is a search worth: repeats docs/evidence/search. Two runs side by side, one thread each; an hour and a half on two
# cores.
#   sh docs/evidence/search.sh PUBLISHED CIFAR10 OUTPUT
# PUBLISHED are the authors' scales of B1: a file, or repopt_vgg_b1.published. CIFAR10 is an image folder. A second call
# continues what was interrupted.
set -eu
published=$1 data=$2 output=$3
search() { OMP_NUM_THREADS=1 python "$(dirname "$0")/search.py" "$published" "$data" "$output/searches" "$@"; }
search fast layer_wise &
search short
wait $!
search
scales=$(for arm in published formula; do echo "$arm=$output/searches/$arm.safetensors"; done
    for arm in short fast layer_wise; do echo "$arm=$output/searches/$arm/scales.safetensors"; done)
trial() {
    name=$1
    shift
    repopt-timm trial repopt_vgg -c cifar10_trial --amp --amp-dtype bfloat16 --data "$data" --train-images 20000 \
        --model-kwargs 'depths=(4,6,16,1)' 'widths=(16,32,64,128,512)' --epochs 8 --warmup-epochs 2 --val-interval 4 \
        --seeds 2 --jobs 2 --threads 1 --scales $scales --arms repopt published formula short fast layer_wise \
        --reference repopt --output "$output/$name" "$@"
}
trial search --tuning-epochs 4
trial search-lr0.1 --lr 0.1
repopt-timm trial --report "$output/search" "$output/search-lr0.1" --reference repopt --output "$output/search-report"
