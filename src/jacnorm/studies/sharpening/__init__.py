"""Study of sharpness, input-output Jacobians and generalisation (MacDonald, Valmadre and Lucey 2023, 2305.14683)."""
