"""Tasks that `distrib init` copies into the user's folder, to be changed there."""
