"""`python -m moelora_cli`, which `accelerate launch -m moelora_cli` and torchrun start."""

from .main import main

if __name__ == "__main__":
    main()
