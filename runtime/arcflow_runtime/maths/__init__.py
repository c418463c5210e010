"""The formulas of the method: noise, schedule, rotary tables, the closed-form update and rounding. No I/O."""
