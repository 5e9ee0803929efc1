"""Everything from a bucket of images to the picks and their report.

    selective-ray submit select --config jobs/configs/imagenet.toml \\
        --images s3://BUCKET/images --run s3://BUCKET/runs/one --budget 2911

The same by Ray's own command, from a checkout:

    ray job submit --working-dir . -- python jobs/selection.py --config jobs/configs/imagenet.toml \\
        --images s3://BUCKET/images --run s3://BUCKET/runs/one --budget 2911
"""

import sys

from selective_ray.cli import app

if __name__ == "__main__":
    app(["select", *sys.argv[1:]])
