"""Whether other processes train the same model, and what follows where they train others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from alpha_optim.distributed import Ranks, initialised
from alpha_optim.user_warning import warn_user


class Processes:
    """The other processes, looked for anew before every iteration.

    Attributes:
        ranks: Those that train the model together, this one among them; None if it is alone.
        separate: Whether they are known to train models of their own, so that none are looked for.
    """

    def __init__(self, model: nn.Module | None) -> None:
        """Begin alone.

        Args:
            model: The model, if it was given.
        """
        self._model = model
        self.ranks: Ranks | None = None
        self.separate = False

    def look_for(self, params: Sequence[Tensor]) -> None:
        """Look for those that train these parameters."""
        if self.separate or not initialised():
            self.ranks = None
        elif self.ranks is None or not self.ranks.train(params):
            self.ranks = Ranks.found(self._model, params)

    def of_one_model(self, params: Sequence[Tensor], steered: bool) -> Ranks | None:
        """Those that hold the same model, which is looked at once; where they do not, each is measured by itself.

        Args:
            params: The parameters.
            steered: Whether a scheduler is to find a rate for all of them.

        Raises:
            ValueError: If it is, and they do not.
        """
        apart = None if self.ranks is None else self.ranks.compare_models(params)
        if apart is not None and steered:
            raise ValueError(apart)
        if apart is not None:
            warn_user(f"{apart}. Every process is measured by itself.")
            self.separate, self.ranks = True, None
        return self.ranks
