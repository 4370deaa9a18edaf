"""One file per technique: a function per claim, which measures it on a real model, a trace or a closed form."""
