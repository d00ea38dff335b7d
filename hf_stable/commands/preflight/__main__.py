"""What a preflight starts for each leg. Apart from `child`, which stands on the list of changes."""

from hf_stable.commands.preflight.child import main

if __name__ == "__main__":
    main()
