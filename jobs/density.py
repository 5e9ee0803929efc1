"""Measure how dense the neighborhood of every image is, after embedding where that is not done.

    selective-ray submit density --config jobs/configs/imagenet.toml \\
        --images s3://BUCKET/images --run s3://BUCKET/runs/one

The same by Ray's own command, from a checkout:

    ray job submit --working-dir . -- python jobs/density.py --config jobs/configs/imagenet.toml \\
        --images s3://BUCKET/images --run s3://BUCKET/runs/one
"""

import sys

from selective_ray.cli import app

if __name__ == "__main__":
    app(["density", *sys.argv[1:]])
