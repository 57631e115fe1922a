"""`repopt-timm trial`: does the prior help a network? Several ways to train it, with paired seeds and error bars."""
