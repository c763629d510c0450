"""How many candidates of a prompt are painted and kept by those who paint to choose, where nobody says."""

CANDIDATES = 16  # where neither their number nor a budget is given
KEPT = 4  # of those that are ranked


def how_many(
    num_images_per_prompt: int | None, keep: int | None, budget: float | None, *, is_ranked: bool
) -> tuple[int | None, int | None]:
    """Candidates to paint (None: as many as fit the budget) and to keep (None: all), where these were left out."""
    if num_images_per_prompt is None and budget is None:
        num_images_per_prompt = CANDIDATES
    if keep is None:
        keep = min(KEPT, num_images_per_prompt or KEPT) if is_ranked else num_images_per_prompt
    return num_images_per_prompt, keep
