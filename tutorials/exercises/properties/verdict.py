"""Does a property tell a wrong implementation from the right one? Used by all exercises and solutions."""


def counterexample(law, implementation):
    """What the law says against an implementation, or None if it holds."""
    try:
        law(implementation)
    except AssertionError as problem:
        return str(problem).strip() or "an assertion without a message"
    return None


def verdict(law, wrong, right):
    """Print what the law says about both; tell whether it is a good one."""
    unjust, caught = counterexample(law, right), counterexample(law, wrong)
    if unjust is not None:
        print(f"{law.__name__} is too strict: it refuses the library, which is right.\n{unjust}")
    elif caught is None:
        print(f"{law.__name__} holds for the wrong implementation, too. Which inputs does it never try?")
    else:
        print(f"{law.__name__} catches it:\n{caught}")
    return unjust is None and caught is not None
