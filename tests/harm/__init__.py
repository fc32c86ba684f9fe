"""Does a guard or a scheduler ever make a run worse? The judge of "first, do no harm"."""
