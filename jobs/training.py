"""Train FixMatch on the labels that people gave to the picks.

    selective-ray submit train \\
        --run s3://BUCKET/runs/one --preset fixmatch-imagenet-eman

The same by Ray's own command, from a checkout:

    ray job submit --working-dir . -- python jobs/training.py \\
        --run s3://BUCKET/runs/one --preset fixmatch-imagenet-eman
"""

import sys

from selective_ray.cli import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]])
