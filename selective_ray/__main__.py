"""`python -m selective_ray` is the command `selective-ray`."""

from selective_ray.cli import main

if __name__ == "__main__":
    main()
