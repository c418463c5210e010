"""The method's formulas in numpy: noise, schedule, rotary tables, closed-form update, dtype rounding. No I/O."""
