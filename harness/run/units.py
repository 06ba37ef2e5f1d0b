"""Durations and sizes in words, in the unit that a person would choose."""


def in_hours(hours: float) -> str:
    """Return a duration, given in hours: in hours, minutes or seconds."""
    if hours >= 1:
        return f"{hours:,.2f} hours"
    if hours * 60 >= 2:
        return f"{hours * 60:.1f} minutes"
    return f"{hours * 3600:.0f} seconds"


def in_gib(gib: float) -> str:
    """Return a size, given in GiB, in three digits: in GiB, or in MiB where it is less than a tenth of one."""
    if gib >= 100:
        return f"{gib:,.0f} GiB"
    return f"{gib:.3g} GiB" if gib >= 0.1 else f"{gib * 1024:.3g} MiB"
