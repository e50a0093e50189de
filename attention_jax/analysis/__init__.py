"""What a module or network costs, holds and looks at."""
