def write_report(out, rows):
    pass
