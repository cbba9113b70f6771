"""Several feedback tasks of one user and item: HoME beside MMoE, PLE and a shared bottom."""
